"""The run folder: journal of calls, records, quarantine, manifest, lock."""

from cai.store.database import Batch, Call, Claim, Database, Quarantined, RoleUsage
from cai.store.folder import Mode, RunFolder, content_hash, would_lose, write_whole
from cai.store.remote import Mirror, is_remote, local_copy

__all__ = [
    "Batch",
    "Call",
    "Claim",
    "Database",
    "Mirror",
    "Mode",
    "Quarantined",
    "RoleUsage",
    "RunFolder",
    "content_hash",
    "is_remote",
    "local_copy",
    "would_lose",
    "write_whole",
]
