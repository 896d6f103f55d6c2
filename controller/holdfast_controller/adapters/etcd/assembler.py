"""Puts the answers of one watch stream together into batches of whole revisions. Pure.

Etcd sends the changes of one revision in one answer, but may cut a large answer into fragments at
any change. Whoever resumes after revision r must have had all of r. So:

    batch.revision < the revision of every change not yet handed out
    every batch holds all of its revisions' changes

What is kept between two answers is at most the last revision of an unfinished answer.

The stream is asked to begin one revision before the first one owed, and the overlap is dropped
here. Three reasons: etcd answers progress requests only for watchers that begin at or before its
current revision (3.4.25 and later); a deletion exactly at the compacted revision may be missing
from the history (until 3.5.18), and with the overlap that case ends as "compacted" instead; and a
confirmation below the overlap proves that this store has forgotten what we have seen.

Source: etcd server/mvcc/watchable_store.go (progressIfSync, syncWatchers); api/v3rpc/watch.go
(sendFragments); the compaction report is etcd issue 19179.
"""

from collections.abc import Iterable

from holdfast_controller.adapters.etcd.values import ChangeKind, KeyValue, WatchBatch

Change = tuple[ChangeKind, KeyValue]


class Assembler:
    """Turns answers into batches, from `next_revision` on."""

    def __init__(self, next_revision: int) -> None:
        """Begin with nothing kept; changes before `next_revision` are dropped as known."""
        assert next_revision >= 1, next_revision
        self.next_revision = next_revision
        self._kept: list[Change] = []

    def add(self, changes: Iterable[Change], *, more_fragments: bool) -> WatchBatch | None:
        """Take one answer; return what is whole now, if anything is."""
        for kind, key_value in changes:
            if key_value.mod_revision >= self.next_revision:
                self._kept.append((kind, key_value))
        if not self._kept:
            return None
        last = self._kept[-1][1].mod_revision
        count = len(self._kept)
        if more_fragments:
            while count and self._kept[count - 1][1].mod_revision == last:
                count -= 1
        if count == 0:
            return None
        whole, self._kept = tuple(self._kept[:count]), self._kept[count:]
        revision = whole[-1][1].mod_revision
        self.next_revision = revision + 1
        return WatchBatch(revision=revision, events=whole)
