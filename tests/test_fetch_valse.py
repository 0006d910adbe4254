"""Fetching VALSE from a server of our own: checked, whole or not at all, and clear about what went wrong."""

import hashlib
import importlib.util
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clip_lens.data.read import read_pairs

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "fetch_valse.py"
SPEC = importlib.util.spec_from_file_location("fetch_valse", SCRIPT)
fetch_valse = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fetch_valse)


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder; a name that starts with "broken" is promised longer than it is."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        if not Path(self.path).name.startswith("broken"):
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"a": 1}')


@pytest.fixture
def served(tmp_path):
    """A folder and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


def run(capsys, *arguments):
    code = fetch_valse.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_the_file_is_fetched_checked_and_read(served, shared, tmp_path, capsys):
    folder, base = served
    (folder / "existence.json").write_bytes((shared / "data" / "valse" / "existence.json").read_bytes())
    out = tmp_path / "new" / "existence.json"
    code, said = run(capsys, "--out", out, "--base", base)
    assert code == 0 and "as expected" in said
    assert len(read_pairs(out)) == 505 and [file.name for file in out.parent.iterdir()] == ["existence.json"]
    (folder / "existence.json").unlink()
    code, said = run(capsys, "--out", out, "--base", base)  # nothing is downloaded again
    assert code == 0 and "is there already" in said


def test_a_file_address_and_a_folder_to_write_to_do_as_well(shared, tmp_path, capsys):
    base = (shared / "data" / "valse").as_uri()
    assert run(capsys, "--out", tmp_path, "--base", base)[0] == 0
    assert len(read_pairs(tmp_path / "existence.json")) == 505


def test_a_corrupted_file_is_not_written(served, shared, tmp_path, capsys):
    folder, base = served
    content = bytearray((shared / "data" / "valse" / "existence.json").read_bytes())
    content[1000] ^= 1
    (folder / "existence.json").write_bytes(content)
    out = tmp_path / "existence.json"
    code, said = run(capsys, "--out", out, "--base", base)
    assert code == 1 and "damaged or the file has changed" in said and hashlib.sha256(content).hexdigest() in said
    assert not out.exists() and [file.name for file in tmp_path.iterdir()] == ["served"]


def test_what_is_there_and_differs_stays_unless_told(served, tmp_path, capsys):
    folder, base = served
    (folder / "plurals.json").write_text('{"a": 1}')
    digest = hashlib.sha256(b'{"a": 1}').hexdigest()
    out = tmp_path / "plurals.json"
    out.write_text("mine")
    common = ("plurals.json", "--out", out, "--base", base)
    for more in ((), ("--sha256", digest)):
        code, said = run(capsys, *common, *more)
        assert code == 1 and "is there already" in said and out.read_text() == "mine"
    assert run(capsys, *common, "--sha256", digest.upper(), "--overwrite")[0] == 0
    assert json.loads(out.read_text()) == {"a": 1}
    assert run(capsys, *common, "--sha256", digest)[0] == 0


def test_other_files_have_their_digest_printed(served, tmp_path, capsys):
    folder, base = served
    (folder / "counting.json").write_text("{}")
    code, said = run(capsys, "counting.json", "--out", tmp_path / "c.json", "--base", base)
    assert code == 0 and hashlib.sha256(b"{}").hexdigest() in said and "not known" in said
    (folder / "page.json").write_text("<html>")
    code, said = run(capsys, "page.json", "--out", tmp_path / "p.json", "--base", base)
    assert code == 1 and "isn't JSON" in said and not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("name", ["absent.json", "broken.json"])
def test_no_such_file_and_a_download_that_breaks_off(served, tmp_path, capsys, name):
    code, said = run(capsys, name, "--out", tmp_path / "x.json", "--base", served[1])
    assert code == 1 and not (tmp_path / "x.json").exists()
    assert ("answers 404" if name == "absent.json" else "8 bytes read, 992 more expected") in said


@pytest.mark.parametrize("base", ["http://127.0.0.1:9/", "file:///no/such/folder", "nothing"])
def test_no_connection_is_said(tmp_path, capsys, base):
    code, said = run(capsys, "--out", tmp_path / "x.json", "--base", base)
    assert code == 1 and "can't get" in said and "by hand" in said and not list(tmp_path.iterdir())
