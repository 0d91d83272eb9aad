"""The index on a real PostgreSQL server and in SQLite: the same rows, several writers, no password shown. Budget: 40 s.

The server comes out of a package (shared_tests/support/postgresql.py), so that nothing here is ever skipped.
"""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from core.ablation import runner
from core.ablation.index import COLUMNS, Index, StoreError
from core.ablation.plan import read_plan
from core.ablation.store import Store
from core.cli import main
from shared_tests.support.ablation_runs import PLAN, WORKER, go, places, write
from shared_tests.support.killed import small_data
from shared_tests.support.postgresql import PASSWORD, Server

ROW: dict[str, Any] = dict.fromkeys(COLUMNS, None) | {"key": "k", "seed": 1, "status": "done", "bpb": 1.25}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing from whoever runs the tests decides where libpq connects to."""
    for name in ("PGPASSWORD", "PGHOST", "PGUSER", "PGDATABASE", "PGSERVICE", "PGOPTIONS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'index.sqlite'}"
    return request.getfixturevalue("server").database()


def ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: str(sorted(row.items(), key=str)))


def test_the_same_rows_as_sqlite(server: Server, tmp_path: Path) -> None:
    """Entered run by run and made again from the folders: both tables hold the same on both, a failed run too."""
    plan = read_plan(write(tmp_path, PLAN.replace("[1, 2, 3, 4]", "[1, 13]")))
    ours, theirs = Store(tmp_path / "store"), Store(tmp_path / "store", server.database())
    where = places(ours, plan)
    go(ours, where)
    ours.write_members(plan, where)
    for store in (ours, theirs):
        store.enter_members(plan, where)
        for place, result in zip(where, store.outcome(plan, where).results, strict=True):
            store.update(place, result)
    entered = {table: ordered(theirs.rows(table)) for table in ("runs", "members")}
    assert entered == {table: ordered(ours.rows(table)) for table in ("runs", "members")}
    assert sorted(row["status"] for row in entered["runs"]) == ["done", "done", "failed", "failed"]
    assert {row["message"] for row in entered["runs"]} == {None, "skc train: the loss (nan) is not finite"}
    assert all(1 <= row["beside"] <= 2 and row["threads"] == 1 for row in entered["runs"])
    with server.connect() as connection:
        connection.execute("DELETE FROM runs")
        connection.execute("UPDATE members SET variant = variant || '!'")
    assert theirs.rebuild() == ours.rebuild() == 4
    assert entered == {table: ordered(theirs.rows(table)) for table in ("runs", "members")}


def test_odd_values_come_back_alike(address: str) -> None:
    """No NaN, no NUL, no half letters, which one of the two refuses; long text and every script are kept whole."""
    long = "x" * 300_000 + "é"
    index = Index(address)
    odd = ROW | {
        "message": f"größe 日本 🐈 ' \" \\ % {long}",
        "bpb": float("nan"),
        "error": float("inf"),
        "bytes": 2**40,
    }
    index.put(odd)
    assert index.rows("runs") == [odd | {"bpb": None, "error": None}]
    index.put(ROW | {"message": "a\0b\ud800c", "bpb": 1 / 3})
    assert index.rows("runs") == [ROW | {"message": "a\ufffdb?c", "bpb": 1 / 3}], "a second row, or other digits"


WRITE = """
import json, sys
from core.ablation.index import Index
index, ROW, me = Index(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
sys.stdin.readline()  # begin together: nobody has made the tables yet
for i in range(6):
    index.put({**ROW, "key": "both", "seed": i, "status": f"{me}"})
    index.put({**ROW, "key": f"{me}-{i}", "seed": i})
    index.put_members("one", [{"ablation": "one", "variant": v, "seed": s, "backend": "cuda", "key": f"{me}-{i}"}
                              for v in "abc" for s in range(3)])
    index.put_members(f"of-{me}", [{"ablation": f"of-{me}", "variant": "a", "seed": i, "backend": "cuda", "key": "k"}])
"""


def test_several_writers_at_once(address: str) -> None:
    """Three processes: no row is lost or there twice, and a list of runs is one writer's, never parts of two."""
    command = [sys.executable, "-W", "error", "-c", WRITE, address, json.dumps(ROW)]
    writers = [subprocess.Popen([*command, str(me)], stdin=subprocess.PIPE) for me in range(3)]
    for process in writers:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
    assert [process.wait(timeout=120) for process in writers] == [0, 0, 0]
    index = Index(address)
    runs, members = index.rows("runs"), index.rows("members")
    assert sorted(row["key"] for row in runs) == sorted(["both", *(f"{me}-{i}" for me in range(3) for i in range(6))])
    assert next(row for row in runs if row["key"] == "both")["seed"] == 5
    shared = [row for row in members if row["ablation"] == "one"]
    assert len(shared) == 9 and len({row["key"] for row in shared}) == 1
    assert sorted((r["ablation"], r["seed"]) for r in members if r not in shared) == [(f"of-{m}", 5) for m in range(3)]


def test_who_enters_a_run_while_the_index_is_made_again_is_not_lost(address: str, tmp_path: Path) -> None:
    """The folders are read while nobody else may write: an update that comes meanwhile waits, and comes after."""
    Index(address).put(ROW)
    begun: list[subprocess.Popen] = []

    def read() -> dict[str, list[dict[str, Any]]]:
        text = (
            "import json, sys; from core.ablation.index import Index; Index(sys.argv[1]).put(json.loads(sys.argv[2]))"
        )
        begun.append(subprocess.Popen([sys.executable, "-c", text, address, json.dumps(ROW | {"status": "new"})]))
        with pytest.raises(subprocess.TimeoutExpired):
            begun[0].wait(timeout=2.5)
        return {"runs": [ROW | {"status": "old"}, ROW | {"key": "other"}], "members": []}

    Index(address).rebuild(read)
    assert begun[0].wait(timeout=60) == 0
    wanted = [("k", "new"), ("other", "done")]
    assert sorted((row["key"], row["status"]) for row in Index(address).rows("runs")) == wanted

    def fails() -> dict[str, list[dict[str, Any]]]:
        raise StoreError("a damaged folder")

    with pytest.raises(StoreError, match="a damaged folder"):
        Index(address).rebuild(fails)
    assert len(Index(address).rows("runs")) == 2, "half a rebuild was kept"


def test_tables_of_another_version_or_program(address: str) -> None:
    """One line; --rebuild makes an older version's tables anew, and touches nothing of a program that is not ours."""
    import sqlalchemy as sql

    def run(statement: str) -> Any:
        engine = sql.create_engine(address, poolclass=sql.pool.NullPool)
        with engine.begin() as connection:
            found = connection.execute(sql.text(statement))
            return found.fetchall() if found.returns_rows else None

    Index(address).put(ROW)
    run("ALTER TABLE runs DROP COLUMN targets")
    with pytest.raises(StoreError, match="table runs has no column targets: it was made by another version; .*rebuild"):
        Index(address).rows("runs")
    Index(address).rebuild(lambda: {"runs": [ROW], "members": []})
    assert Index(address).rows("runs") == [ROW]
    run("ALTER TABLE runs ADD COLUMN newer TEXT")
    with pytest.raises(StoreError, match="table runs has a column newer that is not known here"):
        Index(address).put(ROW)
    run("DROP TABLE runs")
    run("CREATE TABLE runs (run_uuid TEXT, status TEXT)")
    run("INSERT INTO runs VALUES ('theirs', 'FINISHED')")
    for act in (lambda: Index(address).put(ROW), lambda: Index(address).rebuild(lambda: {"runs": [], "members": []})):
        with pytest.raises(StoreError, match="another program's; give another database or schema"):
            act()
    assert run("SELECT * FROM runs") == [("theirs", "FINISHED")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_data(tmp_path_factory.mktemp("text"))


@pytest.fixture
def command(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return an `skc ablate` of two runs, which the stand-in worker takes."""
    use(WORKER, monkeypatch)
    (tmp_path / "p.toml").write_text(textwrap.dedent(PLAN).replace("[1, 2, 3, 4]", "[1]"))
    return ["ablate", str(tmp_path / "p.toml"), "--data", data, "--store", str(tmp_path / "store")]


def use(worker: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    """Let `skc ablate` start this worker."""
    defaults = runner.run_all.__kwdefaults__ or {}
    assert "worker" in defaults
    patch.setattr(runner.run_all, "__kwdefaults__", {**defaults, "worker": worker})


def test_what_cannot_be_reached_is_one_line_without_the_password(
    server: Server, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong password, host, port, database, user, address, kind: exit 2 before anything is trained."""
    good, name = server.database(), "none"
    word = quote(PASSWORD, safe="")
    at = f"@127.0.0.1:{server.port}/"
    for address, message in (
        (good.replace(word, "WRONG-secret"), "password authentication failed"),
        (server.address(name), 'database "none" does not exist'),
        (good.replace(f":{server.port}", ":1"), "onnection refused"),
        (good.replace("127.0.0.1", "no.such.host.invalid"), "no.such.host.invalid"),
        (good.replace("skc:", "nobody:"), "password authentication failed"),
        (f"postgresql+psycopg://skc:{PASSWORD}{at}postgres", "cannot be read"),
        (f"postgresql+psycopg://skc:x@{PASSWORD}{at}postgres", "cannot be read"),
        (f"postgresql+psycopg://skc@127.0.0.1:{server.port}/none?password={word}", 'database "none" does not exist'),
        (f"mysql://skc:{word}{at}x", "not a database that is known here; expected sqlite"),
        (f"postgresql+psycopg://skc:{word}@127.0.0.1:port/x", "cannot be read"),
        ("sqlite://", "names no file"),
    ):
        assert main([*command, "--database", address]) == 2, address
        said = capsys.readouterr()
        assert message in said.err and said.err.count("\n") == 1 and not said.out, said
        for secret in (PASSWORD, word, PASSWORD[-8:], "WRONG", "x@"):
            assert secret not in said.err, said.err
        assert not list((tmp_path / "store").glob("runs/*/run"))
    plain = good.replace("+psycopg", "")  # as other programs write it
    assert Index(plain).rows("runs") == [] and str(Index(plain)) == str(Index(good))
    with server.connect() as connection:
        connection.execute("CREATE ROLE poor LOGIN PASSWORD 'x'")
        connection.execute("DROP TABLE runs, members")
        with pytest.raises(StoreError, match="permission denied for schema public; the runs are intact"):
            Index(good.replace(f"skc:{word}", "poor:x")).rows("runs")
        connection.execute("CREATE SCHEMA mine")
    schema = Index(f"{good}?options=-csearch_path%3Dmine")
    schema.put(ROW)
    assert len(schema.rows("runs")) == 1 and Index(good).rows("runs") == [], "a schema is a place of its own"
    assert PASSWORD not in str(Index(good)) and word not in str(Index(good)) and ":***@" in str(Index(good))


def test_the_password_is_in_no_file_and_not_with_the_workers(
    server: Server, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Given in the address or as PGPASSWORD: neither the store nor a worker ever has it."""
    nosy = f"import os, sys; open(sys.argv[1] + '/seen.txt', 'w').write(str(os.environ) + str(sys.argv)); {RUN}"
    use((sys.executable, "-c", nosy), monkeypatch)
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    database = server.database(password=None)
    assert main([*command, "--database", database]) == 0
    assert len(Index(database).rows("runs")) == 2
    seen = list((tmp_path / "store").glob("runs/*/seen.txt"))
    assert len(seen) == 2 and all("PYTHONPATH" in path.read_text() for path in seen)
    text = (tmp_path / "p.toml").read_text()
    (tmp_path / "p.toml").write_text(text.replace("seeds = [1]", "seeds = [2]"))
    assert main([*command, "--database", server.database()]) == 0
    said = capsys.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and any(path.name == "members.json" for path in files)
    for secret in (PASSWORD, quote(PASSWORD, safe="")):
        assert secret not in said.out + said.err
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
        coded = json.dumps(secret)[1:-1].encode()
        assert [path for path in files if coded in path.read_bytes()] == []


RUN = "import shared_tests.support.ablation_worker as worker; sys.exit(worker.main())"


@pytest.mark.parametrize("back", [False, True])
def test_a_database_that_goes_away_stops_no_run(
    back: bool, server: Server, command: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The runs go on, which is said; what is missing is entered at the end, or by --rebuild when it is there again."""
    calls: list[str] = []
    put: Callable[..., None] = Index.put

    def fragile(self: Index, row: dict[str, Any]) -> None:
        calls.append(row["key"])
        if len(calls) == 1:
            server.stop()
        if len(calls) == 3 and back:
            server.start()
        put(self, row)

    monkeypatch.setattr(Index, "put", fragile)
    database = server.database()
    code = main([*command, "--database", database, "--json"])
    said = capsys.readouterr()
    assert code == (0 if back else 1), said.err
    found = json.loads(said.out)
    assert found["failed"] == [] and [v["n"] for v in found["backends"]["cuda"]["variants"]] == [1, 1]
    lines = [line for line in said.err.splitlines() if line.startswith("careful: index postgresql+psycopg://skc:")]
    assert len(lines) == (2 if back else 3) and all("the runs are intact: use --rebuild" in line for line in lines)
    if not back:
        server.start()
        assert Store(command[-1], database).rebuild() == 2
    assert sorted(row["status"] for row in Index(database).rows("runs")) == ["done", "done"]
    assert len(Index(database).rows("members")) == 2
    assert PASSWORD not in said.err
