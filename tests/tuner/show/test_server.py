"""The dashboard as a browser's requests meet it: the token, the read-only mode, and what strangers try."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPMessage
from pathlib import Path
from urllib.parse import unquote, urlsplit

import optuna
import pytest
from optuna.artifacts import FileSystemArtifactStore, upload_artifact

from trainer import UserError
from tuner.show.server import guarded, make_dashboard
from tuner.study.storage import artifact_dir, open_storage


class Client:
    def __init__(self, address: str) -> None:
        self.parts = urlsplit(address)
        self.cookie, self.headers = "", HTTPMessage()
        """`headers`: those of the last answer."""

    def request(self, method: str, path: str, **headers: str) -> tuple[int, str]:
        """With these headers, in place of the Host by default, and without an Accept-Encoding."""
        connection = HTTPConnection(self.parts.hostname or "", self.parts.port or 0, timeout=20)
        connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
        for name, value in {**({"Cookie": self.cookie} if self.cookie else {}), **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        body = response.read().decode(errors="replace")
        connection.close()
        self.headers = response.headers
        if given := response.headers.get("Set-Cookie"):
            self.cookie = given.partition(";")[0]
        return response.status, body

    def log_in(self) -> None:
        status, _ = self.request("GET", f"/?{self.parts.query}")
        assert status == 303


def count_studies(client: Client) -> int:
    _, body = client.request("GET", "/api/studies")
    return len(json.loads(body)["study_summaries"])


def serve(tmp_path: Path, *, read_only: bool) -> Iterator[Client]:
    storage = open_storage(f"sqlite:///{tmp_path}/tuner.db")
    optuna.create_study(study_name="toy", storage=storage)
    server, address = make_dashboard(storage, port=0, read_only=read_only)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Client(address)
    server.shutdown()
    server.server_close()
    thread.join()
    storage.remove_session()
    storage._backend.engine.dispose() if hasattr(storage, "_backend") else storage.engine.dispose()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    yield from serve(tmp_path, read_only=False)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Client]:
    yield from serve(tmp_path, read_only=True)


def test_without_the_token_nothing_is_shown_and_nothing_changed(client: Client) -> None:
    for method, path in (("GET", "/"), ("GET", "/api/studies"), ("DELETE", "/api/studies/1"), ("GET", "/?token=no")):
        status, body = client.request(method, path)
        assert status == 403 and "toy" not in body
    client.log_in()
    client.cookie = client.cookie[:-1]
    assert client.request("GET", "/api/studies")[0] == 403


@pytest.mark.parametrize("foreign", ["a[1]=2", 'x={"a":1}', "b=1 2", "name", "tuner_token_00000000=another's"])
def test_other_programs_cookies_do_not_lock_a_person_out(client: Client, foreign: str) -> None:
    client.log_in()
    client.cookie = f"{foreign}; {client.cookie}; {foreign}"
    assert client.request("GET", "/api/studies")[0] == 200


def test_two_dashboards_on_one_host_do_not_log_each_other_out() -> None:
    names = set()
    for token in ("one", "other"):
        app = guarded(lambda environ, start: [b""], token=token, read_only=False)
        answered: list[tuple[str, str]] = []
        app({"QUERY_STRING": f"token={token}"}, lambda status, headers, answered=answered: answered.extend(headers))
        names.add(dict(answered)["Set-Cookie"].partition("=")[0])
    assert len(names) == 2


def test_token_leads_to_the_same_page_of_the_same_host() -> None:
    for path, location in (("//evil.example/a", "/evil.example/a"), ("/a%0d%0aX: 1", "/a%0D%0AX%3A%201")):
        answered: list[tuple[str, str]] = []
        environ = {"QUERY_STRING": "token=t", "PATH_INFO": unquote(path, "latin-1")}
        guarded(lambda environ, start: [b""], token="t", read_only=False)(
            environ, lambda status, headers, answered=answered: answered.extend(headers)
        )
        assert dict(answered)["Location"] == location


def test_token_opens_the_study(client: Client) -> None:
    client.log_in()
    status, body = client.request("GET", "/api/studies")
    assert status == 200 and "toy" in body
    assert client.request("GET", "/dashboard/")[0] == 200


def test_with_the_token_a_study_can_be_deleted(client: Client) -> None:
    client.log_in()
    # The page reads every answer as JSON, this one too.
    assert client.request("DELETE", "/api/studies/1") == (200, "{}")
    assert "toy" not in client.request("GET", "/api/studies")[1]


def test_read_only_refuses_every_change_and_shows_all(reader: Client) -> None:
    reader.log_in()
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert reader.request(method, "/api/studies/1")[0] == 403
    assert "toy" in reader.request("GET", "/api/studies")[1]


def test_taken_port_is_a_user_error(client: Client, tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/tuner.db")
    with pytest.raises(UserError, match=f"--port {client.parts.port}, --host 127.0.0.1: .*in use; choose another"):
        make_dashboard(storage, port=client.parts.port or 0)
    storage.engine.dispose()


def test_uploaded_page_is_a_download_and_runs_nothing(client: Client, tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/tuner.db")
    (study,) = storage.get_all_studies()
    (tmp_path / "page.html").write_text("<script>parent.document.title = 'in'</script>")
    store = FileSystemArtifactStore(artifact_dir(storage))
    loaded = optuna.load_study(study_name="toy", storage=storage)
    name = upload_artifact(artifact_store=store, file_path=str(tmp_path / "page.html"), study_or_trial=loaded)
    client.log_in()
    status, body = client.request("GET", f"/artifacts/{study._study_id}/{name}")
    assert status == 200 and "<script>" in body and client.headers["Content-Type"] == "text/html"
    assert client.headers["Content-Disposition"] == "attachment"
    assert client.headers["Content-Security-Policy"] == "sandbox; default-src 'none'"
    assert client.headers["X-Content-Type-Options"] == "nosniff"
    assert client.headers["Access-Control-Allow-Origin"] is None


def test_every_answer_forbids_embedding_foreign_scripts_and_copies(client: Client) -> None:
    pages = ["/", "/dashboard", "/api/studies", "/static/bundle.js", "/none"]
    for path in [*pages, f"/?{client.parts.query}", *pages]:
        client.request("GET", path)
        assert client.headers["X-Frame-Options"] == "DENY"
        assert "default-src 'self'" in client.headers["Content-Security-Policy"]
        assert client.headers["Referrer-Policy"] == "no-referrer" and client.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "[", ""])
def test_page_that_points_its_own_name_here_is_refused(client: Client, host: str) -> None:
    client.log_in()
    status, body = client.request("GET", "/api/studies", Host=host)
    assert status == 403 and "open the address that" in body
    assert client.request("GET", f"/?{client.parts.query}", Host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "192.168.1.2"])
def test_addresses_of_this_machine_are_answered(client: Client, host: str) -> None:
    client.log_in()
    assert client.request("GET", "/api/studies", Host=f"{host}:{client.parts.port}")[0] == 200


def test_change_from_another_origin_is_refused(client: Client) -> None:
    client.log_in()
    own, other = f"http://{client.parts.netloc}", "http://127.0.0.1:1"
    for origin in (other, "null", f"{own}.evil.example", ""):
        assert client.request("DELETE", "/api/studies/1", Origin=origin)[0] == 403
    assert count_studies(client) == 1
    assert client.request("DELETE", "/api/studies/1", Origin=own)[0] == 200 and count_studies(client) == 0
