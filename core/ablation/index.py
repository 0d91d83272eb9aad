"""The index of a store: the same two tables in SQLite or PostgreSQL, a view of run folders that can be made again.

One process writes at a time: SQLite's write lock, on PostgreSQL an advisory lock that a transaction holds to its end.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.ablation.records import StoreError
from core.console import one_line
from core.files import check_own

COLUMNS = {
    "key": str, "preset": str, "seed": int, "backend": str, "dtype": str, "code": str, "data": str, "status": str,
    "bpb": float, "error": float, "label": str, "byte_rule": str, "documents": int, "total_documents": int,
    "targets": int, "bytes": int, "parameters": int, "steps": int, "seconds": float, "tokens_per_second": float,
    "device": str, "host": str, "threads": int, "beside": float, "message": str, "config": str, "folder": str,
}  # fmt: skip
"""Table `runs`: one row per run folder."""
MEMBERS = {"ablation": str, "variant": str, "seed": int, "backend": str, "key": str}
"""Table `members`: which runs an ablation has."""
TABLES = {"runs": (COLUMNS, ("key",)), "members": (MEMBERS, ("ablation", "variant", "seed", "backend"))}
"""Columns and primary key of each table."""
MARKS = {"runs": {"key", "preset", "config", "folder"}, "members": {"ablation", "variant", "key"}}
"""Columns that these tables have in every version: one without them belongs to another program and is left alone."""
PATIENCE = 60
"""Seconds to wait for another writer."""
CONNECT = 10
"""Seconds to wait for a server."""
WRITER = 7_364_995_170_143
"""PostgreSQL's advisory lock of whoever writes."""
EXPECTED = "expected sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE"


class Index:
    """A database; StoreError says what is wrong with its address or with the database, and never shows a password."""

    def __init__(self, address: str) -> None:
        import sqlalchemy as sql

        self._url = _url(address)
        self._postgresql = self._url.drivername.startswith("postgresql")
        self._checked = False
        self._engine: Any = None
        self._meta = sql.MetaData()
        kinds = {str: sql.Text, int: sql.BigInteger, float: sql.Double}
        for name, (columns, keys) in TABLES.items():
            made = (sql.Column(c, kinds[kind](), primary_key=c in keys) for c, kind in columns.items())
            sql.Table(name, self._meta, *made)

    def put(self, row: dict[str, Any]) -> None:
        """Enter a run, in place of what was there of it."""
        from sqlalchemy.dialects import postgresql, sqlite

        insert = postgresql.insert if self._postgresql else sqlite.insert
        made = insert(self._meta.tables["runs"]).values(_plain(row))
        others = {name: made.excluded[name] for name in COLUMNS if name != "key"}
        with self._open(write=True) as connection:
            connection.execute(made.on_conflict_do_update(index_elements=["key"], set_=others))

    def put_members(self, ablation: str, rows: list[dict[str, Any]]) -> None:
        """Enter an ablation's list of runs, in place of an earlier one."""
        table = self._meta.tables["members"]
        with self._open(write=True) as connection:
            connection.execute(table.delete().where(table.c.ablation == ablation))
            if rows:
                connection.execute(table.insert(), list(map(_plain, rows)))

    def rebuild(self, read: Callable[[], dict[str, list[dict[str, Any]]]]) -> None:
        """Make all tables again of what `read` returns, while nobody else writes; if it raises, nothing is changed."""
        with self._open(write=True, remake=True) as connection:
            found = read()
            for name, table in self._meta.tables.items():
                connection.execute(table.delete())
                if found[name]:
                    connection.execute(table.insert(), list(map(_plain, found[name])))

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Return a table, `runs` or `members`."""
        with self._open() as connection:
            return [dict(row._mapping) for row in connection.execute(self._meta.tables[table].select())]

    @contextmanager
    def _open(self, write: bool = False, remake: bool = False) -> Iterator[Any]:
        """Yield a connection in a transaction; tables are made where they are not there yet."""
        import sqlalchemy as sql
        from sqlalchemy import exc

        try:
            engine = self._engine = self._engine or self._connected()
            with engine.begin() as connection:
                if self._postgresql and (write or not self._checked):
                    connection.execute(sql.select(sql.func.pg_advisory_xact_lock(WRITER)))
                if not self._checked or remake:
                    self._check(connection, remake)
                yield connection
            self._checked = True
        except ModuleNotFoundError as error:
            raise StoreError(f"--database {self}: {error}; pip install -e '.[postgresql]'") from error
        except exc.SQLAlchemyError as error:
            cause: Any = getattr(error, "orig", None) or error
            server = getattr(cause, "diag", None)  # PostgreSQL's own words, without the statement
            said = one_line(server and server.message_primary or cause)[:400]
            again = "use --rebuild when the database can be used again"
            broken = "SQLITE_CORRUPT", "SQLITE_NOTADB"  # one that is locked, or whose disk is full, is not
            if getattr(cause, "sqlite_errorname", "") in broken:
                again = "delete that file and use --rebuild"
            raise StoreError(f"index {self}: {said}; the runs are intact: {again}") from error

    def _connected(self) -> Any:
        """Return what makes connections, a new one for each transaction."""
        import sqlalchemy as sql
        from sqlalchemy import event, pool

        options: dict[str, Any] = {"connect_timeout": CONNECT, "client_encoding": "utf8"} if self._postgresql else {}
        if not self._postgresql:
            Path(self._url.database).parent.mkdir(parents=True, exist_ok=True)
            for end in ("", "-wal", "-shm", "-journal"):  # SQLite opens whatever lies there
                check_own(f"{self._url.database}{end}")
        options = {name: value for name, value in options.items() if name not in self._url.query}
        engine = sql.create_engine(self._url, poolclass=pool.NullPool, connect_args=options)
        event.listen(engine, "connect", _postgresql_settings if self._postgresql else _sqlite_settings)
        if not self._postgresql:  # the driver would begin late, and a transaction that has only read may not write then
            event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        return engine

    def _check(self, connection: Any, remake: bool) -> None:
        """Make missing tables; StoreError for those of another version (`remake`: made anew) or another program."""
        import sqlalchemy as sql

        looked = sql.inspect(connection)
        for name, table in self._meta.tables.items():
            found = {column["name"] for column in looked.get_columns(name)} if looked.has_table(name) else None
            wanted = set(table.columns.keys())
            if found is None or found == wanted:
                continue
            lacks, more = ", ".join(sorted(wanted - found)), ", ".join(sorted(found - wanted))
            what = f"table {name} has {f'no column {lacks}' if lacks else f'a column {more} that is not known here'}"
            if not found >= MARKS[name]:
                raise StoreError(f"index {self}: {what}: it is another program's; give another database or schema")
            if not remake:
                raise StoreError(
                    f"index {self}: {what}: it was made by another version; the runs are intact: use --rebuild"
                )
            table.drop(connection)
        self._meta.create_all(connection)

    def __str__(self) -> str:
        """Return the address without password and options, which may hold one."""
        return self._url.set(query={}).render_as_string(hide_password=True)


def sqlite_address(path: Path) -> str:
    """Return the address of an SQLite file; a ? or % in its path would else be read as a part of the address."""
    import sqlalchemy as sql

    return sql.URL.create("sqlite", database=str(path)).render_as_string()


def _url(address: str) -> Any:
    """Return SQLAlchemy's URL; of one that cannot be read nothing is shown, since any part may be of a password."""
    import sqlalchemy as sql
    from sqlalchemy import exc

    kind = address.partition("://")[0] if "://" in address else "..."
    try:
        url = sql.make_url(address)
    except (exc.ArgumentError, ValueError):
        url = None
    if url is None or (url.drivername != "sqlite" and address.count("@") > 1):
        coded = "; in a password, @ is written %40, / %2F, : %3A, # %23, % %25"
        raise StoreError(f"--database {kind}://...: cannot be read; {EXPECTED}{coded}")
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg"):
        raise StoreError(f"--database {kind}:...: not a database that is known here; {EXPECTED}")
    if url.drivername == "sqlite" and url.database in (None, "", ":memory:"):
        raise StoreError(f"--database {kind}:...: names no file; {EXPECTED}")
    return url


def _sqlite_settings(connection: Any, _: Any) -> None:
    """Several processes may write: patience and a write-ahead log; this module begins transactions itself."""
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout={1000 * PATIENCE}")
    connection.execute("PRAGMA journal_mode=WAL")


def _postgresql_settings(connection: Any, _: Any) -> None:
    connection.execute(f"SET lock_timeout = '{PATIENCE}s'")
    connection.commit()


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as both keep it: SQLite has no NaN, PostgreSQL no NUL in text, UTF-8 no lone surrogates."""

    def plain(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: plain(value) for name, value in row.items()}
