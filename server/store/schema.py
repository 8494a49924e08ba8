"""Which schema of the database this code reads and writes. Opens no database."""

from __future__ import annotations

from adapters.errors import RegistryError

# The newest file in migrations/versions. It stands here so that opening a database that is up to
# date needs no Alembic, which takes longer to import than all the rest takes to open.
HEAD = "0006"


def unknown_schema(came: object) -> RegistryError:
    """The error for a database whose schema this code does not know."""
    return RegistryError(
        f"the registry's database has schema {came}, this version reads schemas up to {HEAD}",
        field="schema",
        expected=HEAD,
        came=str(came),
    )
