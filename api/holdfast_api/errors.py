"""Errors: RFC 9457 problem documents with a stable `code`, one class per caller's decision.

| class          | the caller should                                  |
|----------------|----------------------------------------------------|
| `Refused`      | change the request; repeating it will not help     |
| `Unavailable`  | try again, here or at another controller           |

Refusals inside cores are data, not exceptions; these classes live at the HTTP border.
"""

from pydantic import BaseModel, ConfigDict, Field


class Problem(BaseModel):
    """RFC 9457 problem document; `code` is stable, `detail` says what to do."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    faults: list[str] = Field(default_factory=list)
    """Every fault of the request at once, where there can be several."""


# code -> (HTTP status, title). Stable: clients match on the code.
PROBLEMS: dict[str, tuple[int, str]] = {
    "invalid-request": (422, "The request is not well formed"),
    "unknown-path": (404, "There is no such resource"),
    "method-not-allowed": (405, "This resource has no such method"),
    "unknown-vm": (404, "No such VM"),
    "unknown-host": (404, "No such host"),
    "unknown-policy": (404, "No such policy"),
    "not-protected": (404, "The VM is not protected"),
    "preflight-failed": (409, "The VM can not be protected"),
    "policy-in-use": (409, "The policy is in use"),
    "wrong-phase": (409, "The protection is not in a phase that allows this"),
    "no-backup": (409, "The protection has no backup"),
    "not-the-backup": (409, "That host is not the backup"),
    "host-not-alive": (409, "The host does not answer"),
    "stale-generation": (409, "The generation is not the current one"),
    "not-your-role": (403, "This host may not say that"),
    "host-in-maintenance": (409, "The host is in maintenance"),
    "too-large": (413, "The request is too large"),
    "busy": (503, "Too many requests of this kind at once"),
    "conflict": (409, "Somebody else changed the record at the same time"),
    "store-unavailable": (503, "The store does not answer"),
    "no-controller": (503, "No controller answers"),
    "internal": (500, "A fault of the controller"),
}


class HoldfastError(Exception):
    """Base of what the API can answer besides success."""

    def __init__(self, code: str, detail: str, faults: list[str] | None = None) -> None:
        """Make an error with a code of `PROBLEMS` and a sentence that says what to do."""
        assert code in PROBLEMS, code
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.faults = faults or []

    @property
    def problem(self) -> Problem:
        """The RFC 9457 document of this error."""
        status, title = PROBLEMS[self.code]
        return Problem(
            title=title, status=status, code=self.code, detail=self.detail, faults=self.faults
        )


class Refused(HoldfastError):  # noqa: N818 - reads as a sentence where it is raised
    """The request was understood and will not be carried out; nothing was changed."""


class Unavailable(HoldfastError):  # noqa: N818
    """Not decided: the store or every controller was out of reach. Repeat, or read first."""
