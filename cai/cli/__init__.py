"""The `cai` command."""
