"""Read a policy from a YAML or JSON file or from standard input. Touches that file only.

JSON is YAML, so one reader serves both.
"""

import json
import sys
from pathlib import Path

import typer
import yaml
from pydantic import ValidationError

from holdfast_api.records import Policy

POLICY_BYTES_MAX = 1024 * 1024


def read_policy(path: Path) -> Policy:
    """Return the policy in `path` (`-`: standard input).

    Raises:
        typer.BadParameter: It can not be read or is no policy; names every fault at once.
    """
    try:
        text = sys.stdin.read(POLICY_BYTES_MAX) if str(path) == "-" else _text_of(path)
        document = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"can not read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise typer.BadParameter(
            f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(document, dict):
        raise typer.BadParameter(f"{path} must hold a policy's fields, such as 'interval_ms: 50'")
    try:
        # Through JSON, in which lists may become tuples and keys are always text.
        return Policy.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'policy'}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        )
        raise typer.BadParameter(f"{path} is no policy: {faults}") from error


def _text_of(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.read(POLICY_BYTES_MAX)
