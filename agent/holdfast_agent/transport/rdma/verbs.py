"""Queue pairs, completion queues and registered memory, with types. Talks to the NIC.

Needs access to /dev/infiniband and a limit of locked memory as large as what is registered.

pyverbs never releases the interpreter's lock, so nothing here may wait: before every call that
could, its descriptor is polled. Work requests of pyverbs 44 are never freed (their `__dealloc` is
misspelt), so there is one send request, filled anew for every post; receives are closed by hand.

Everything must be closed, children first; nothing of pyverbs is left to the garbage collector.
Errors are OSError.

Source: rdma-core 44, pyverbs/*.pyx; ibv_post_send(3); ibv_req_notify_cq(3).
"""

import contextlib
import errno
import os
from dataclasses import dataclass
from typing import Any

from holdfast_agent.transport.rdma.binding import as_os_error, load, with_descriptor
from holdfast_agent.transport.rdma.cm import RETRY_COUNT, CmId

POLL_BATCH = 32

TIMEOUT_EXPONENT = 14
"""A lost packet is sent again after 4.096 us * 2^14 = 67 ms, seven times: half a second.

Keep-alives find a silent peer before; this only has to end one day, on slow hosts as well.
"""

STATUS_SUCCESS = 0
STATUS_FLUSHED = 5
STATUS_RETRIES_EXCEEDED = 12
STATUS_RECEIVER_NOT_READY = 13
"""enum ibv_wc_status."""
STATUS_ERRORS = {
    STATUS_FLUSHED: errno.ECONNRESET,
    STATUS_RETRIES_EXCEEDED: errno.ETIMEDOUT,
}
STATUS_WORDS = {
    4: "memory protection",
    STATUS_FLUSHED: "the connection ended",
    9: "refused by the peer as invalid",
    10: "refused by the peer: no access",
    11: "the peer failed",
    STATUS_RETRIES_EXCEEDED: "the peer's NIC does not answer",
    STATUS_RECEIVER_NOT_READY: "the peer had no receive request",
}


@dataclass(frozen=True, slots=True)
class Completion:
    """A work request that is done."""

    request: int
    status: int
    word: int | None
    """Of a receive: the immediate data that came; None when it was an ordinary message."""

    def failure(self) -> OSError:
        """Return what a status other than success means."""
        number = STATUS_ERRORS.get(self.status, errno.EIO)
        words = STATUS_WORDS.get(self.status, "work completion status")
        return OSError(number, f"RDMA: {words} ({self.status})")


@dataclass(frozen=True, slots=True)
class Depths:
    """How many requests may be posted at a time."""

    send: int
    receive: int


class Region:
    """Registered memory: the NIC may read it, and the peer write it if `remote_write`."""

    def __init__(
        self, cm_id: CmId, address: int, size_bytes: int, *, remote_write: bool = False
    ) -> None:
        """Register; the memory must stay until `close`. Takes about 0.1 ms for each MiB."""
        pyverbs = load()
        access = pyverbs.enums.IBV_ACCESS_LOCAL_WRITE
        if remote_write:
            access |= pyverbs.enums.IBV_ACCESS_REMOTE_WRITE
        with as_os_error(f"registering {size_bytes} bytes (is the limit of locked memory low?)"):
            self._raw = pyverbs.mr.MR(cm_id.raw.pd, size_bytes, access, address=address)
        self.address = address
        self.size_bytes = size_bytes
        self.local_key: int = self._raw.lkey
        self.remote_key: int = self._raw.rkey

    def close(self) -> None:
        """End the registration. Idempotent."""
        with contextlib.suppress(OSError), as_os_error("ending a registration"):
            self._raw.close()


class CompletionQueue:
    """Where finished requests are found, with a descriptor that tells of them once it is armed."""

    def __init__(self, context: Any, depth: int) -> None:
        """Make it for `depth` requests."""
        cq = load().cq
        with as_os_error("making a completion queue"):
            self._channel, self._descriptor = with_descriptor(
                lambda: cq.CompChannel(context), "[infinibandevent]"
            )
            os.set_blocking(self._descriptor, False)
            self.raw = cq.CQ(context, depth, None, self._channel, 0)
        self._is_armed = False
        self._error = load().pyverbs_error.PyverbsError
        self._with_immediate: int = load().enums.IBV_WC_WITH_IMM

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def arm(self) -> None:
        """Let the next completion make the descriptor readable; `poll` again after this."""
        if not self._is_armed:
            with as_os_error("arming a completion queue"):
                self.raw.req_notify()
            self._is_armed = True

    def disarm(self) -> None:
        """Take the event that made the descriptor readable."""
        self._is_armed = False
        with contextlib.suppress(BlockingIOError), as_os_error("taking an event"):
            self._channel.get_cq_event(self.raw)
            self.raw.ack_events(1)

    def poll(self) -> list[Completion]:
        """Return some of the finished requests; empty means that there are no more."""
        try:
            _, found = self.raw.poll(POLL_BATCH)
        except self._error as error:
            raise OSError(errno.EIO, f"RDMA: polling: {error}") from error
        return [
            Completion(
                each.wr_id,
                each.status,
                each.imm_data if each.wc_flags & self._with_immediate else None,
            )
            for each in found
        ]

    def close(self) -> None:
        """Close it, after its queue pair. Idempotent."""
        with contextlib.suppress(OSError), as_os_error("closing a completion queue"):
            self.raw.close()
        with contextlib.suppress(OSError), as_os_error("closing a completion channel"):
            self._channel.close()


class QueuePair:
    """A reliable-connected queue pair under an id of RDMA CM."""

    def __init__(self, cm_id: CmId, depths: Depths) -> None:
        """Make it, with completion queues of its own. The id must have found its device."""
        self._pyverbs = pyverbs = load()
        self._cm_id = cm_id
        context = cm_id.raw.context
        self.sends = CompletionQueue(context, depths.send)
        try:
            self.receives = CompletionQueue(context, depths.receive)
            capabilities = pyverbs.qp.QPCap(max_send_wr=depths.send, max_recv_wr=depths.receive)
            with as_os_error("making a queue pair"):
                self._raw = pyverbs.qp.QP(
                    cm_id.raw.pd,
                    pyverbs.qp.QPInitAttr(
                        qp_type=pyverbs.enums.IBV_QPT_RC,
                        scq=self.sends.raw,
                        rcq=self.receives.raw,
                        cap=capabilities,
                        sq_sig_all=0,
                    ),
                )
        except BaseException:
            self.sends.close()
            raise
        self.number: int = self._raw.qp_num
        self._part = pyverbs.wr.SGE(0, 0, 0)
        self._send = pyverbs.wr.SendWR(num_sge=1, sg=[self._part])
        self._send.sg_list = self._part
        self._signaled: int = pyverbs.enums.IBV_SEND_SIGNALED

    def to_initialised(self) -> None:
        """Go to INIT: from here on receives may be posted."""
        self._modify(self._pyverbs.enums.IBV_QPS_INIT)

    def to_ready(self) -> None:
        """Go on to RTS, when both sides know each other."""
        self._modify(self._pyverbs.enums.IBV_QPS_RTR)
        self._modify(self._pyverbs.enums.IBV_QPS_RTS)

    def write(
        self,
        *,
        address: int,
        length: int,
        local_key: int,
        remote_address: int,
        remote_key: int,
        request: int = 0,
        signaled: bool = False,
        word: int | None = None,
    ) -> None:
        """Post an RDMA WRITE, with `word` as immediate data if given."""
        enums = self._pyverbs.enums
        self._send.opcode = (
            enums.IBV_WR_RDMA_WRITE if word is None else enums.IBV_WR_RDMA_WRITE_WITH_IMM
        )
        self._send.imm_data = word or 0
        self._send.set_wr_rdma(remote_key, remote_address)
        self._post(address, length, local_key, request, signaled=signaled)

    def send(self, *, address: int, length: int, local_key: int, request: int) -> None:
        """Post a SEND, signaled, for providers without immediate data."""
        self._send.opcode = self._pyverbs.enums.IBV_WR_SEND
        self._post(address, length, local_key, request, signaled=True)

    def receive(self, *, address: int, length: int, local_key: int, request: int) -> None:
        """Post a receive of one message or one word."""
        wr = self._pyverbs.wr
        part = wr.SGE(address, length, local_key)
        posted = wr.RecvWR(wr_id=request, num_sge=1, sg=[part])
        try:
            with as_os_error("posting a receive"):
                self._raw.post_recv(posted)
        finally:
            posted.close()
            part.close()

    def close(self) -> None:
        """Destroy it with its completion queues: the peer can write nothing more. Idempotent."""
        with contextlib.suppress(OSError), as_os_error("closing a queue pair"):
            self._raw.close()
        self.sends.close()
        self.receives.close()

    def _modify(self, state: int) -> None:
        with as_os_error("changing a queue pair"):
            attributes, mask = self._cm_id.raw.init_qp_attr(state)
            if state == self._pyverbs.enums.IBV_QPS_INIT:
                # For the side that connects the kernel allows nothing: cma_ib_init_qp_attr.
                attributes.qp_access_flags = (
                    self._pyverbs.enums.IBV_ACCESS_LOCAL_WRITE
                    | self._pyverbs.enums.IBV_ACCESS_REMOTE_WRITE
                )
            if state == self._pyverbs.enums.IBV_QPS_RTS:
                attributes.timeout = TIMEOUT_EXPONENT
                attributes.retry_cnt = RETRY_COUNT
            self._raw.modify(attributes, mask)

    def _post(
        self, address: int, length: int, local_key: int, request: int, *, signaled: bool
    ) -> None:
        self._part.addr, self._part.length, self._part.lkey = address, length, local_key
        self._send.wr_id = request
        self._send.send_flags = self._signaled if signaled else 0
        try:
            self._raw.post_send(self._send)
        except self._pyverbs.pyverbs_error.PyverbsError as error:
            raise OSError(errno.EIO, f"RDMA: posting a send: {error}") from error
