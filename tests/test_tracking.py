"""Logging to Weights & Biases never costs a result: it falls back, in one line, and says no to names at once."""

import http.server
import logging
import threading

import pytest

from edgesched.errors import ConfigError
from edgesched.runs.tracking import Tracker, _logged_in


@pytest.fixture
def server(monkeypatch):
    """A server that answers everything with the status that its attribute names."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("content-length") or 0))
            self.send_response(found.status)
            self.send_header("content-length", "2")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(b"{}")

        do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

        def log_message(self, *_):
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.status = 401
    serving = threading.Thread(target=found.serve_forever, daemon=True)
    serving.start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{found.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    yield found
    found.shutdown()
    found.server_close()
    serving.join()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tags": ["a" * 70]}, r"logger\.tags: .*70 characters"),
        ({"tags": ["fine", ""]}, r"logger\.tags: .*empty"),
        ({"tags": "fine"}, r"logger\.tags: expected a list of texts, got 'fine'"),
        ({"project": "a/b"}, r"logger\.project: .*'a/b'.*cannot contain"),
        ({"project": "a" * 200}, r"logger\.project: "),
        ({"mode": "loud"}, r"logger\.mode: 'loud' is not one of"),
    ],
)
def test_what_wandb_refuses_is_one_line_before_anything_begins(tmp_path, setting, message):
    with pytest.raises(ConfigError, match=message) as told:
        Tracker(tmp_path, {}, "t", **setting)
    assert "\n" not in str(told.value)


def test_without_an_answer_the_run_is_kept_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    import wandb

    wandb.teardown()  # settings of the environment are read once a process
    with caplog.at_level(logging.WARNING), Tracker(tmp_path, {"a": 1}, "t", mode="online") as tracker:
        tracker.summary({"value": 2.0})
    assert [m for m in caplog.messages if "does not answer" in m]
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1
    wandb.teardown()


def test_a_server_that_refuses_the_key_leaves_the_run_offline(tmp_path, server, caplog):
    import wandb

    wandb.teardown()
    with caplog.at_level(logging.WARNING), Tracker(tmp_path, {"a": 1}, "t", mode="online") as tracker:
        tracker.summary({"value": 2.0})
    assert [m for m in caplog.messages if "kept offline" in m]
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1
    wandb.teardown()


def test_a_login_kept_in_netrc_counts(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    file = tmp_path / "netrc"
    file.write_text("machine api.example.com\n  login user\n  password " + "0" * 40 + "\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    assert _logged_in("https://api.example.com")
    assert not _logged_in("https://other.example.com")
    file.write_text("machine")
    assert not _logged_in("https://api.example.com")


def test_logging_that_breaks_is_left_out_and_the_body_goes_on(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), Tracker(tmp_path, {}, "t", mode="disabled") as tracker:
        tracker.images({"picture": tmp_path / "missing.png"})
        tracker.run.finish()
        done = True
    assert done
    assert [m for m in caplog.messages if m.startswith("W&B: pictures: left out")]


def test_a_folder_that_wandb_cannot_write_leaves_the_run_unlogged(tmp_path, caplog, monkeypatch):
    begun = Tracker._begun

    def failing(self, mode):
        if mode != "disabled":
            raise OSError("no space left")
        return begun(self, mode)

    monkeypatch.setattr(Tracker, "_begun", failing)
    with caplog.at_level(logging.WARNING), Tracker(tmp_path, {}, "t") as tracker:
        tracker.metrics({"value": 1.0})
    assert "W&B: OSError: no space left; this run is not logged" in caplog.messages


def test_tracker_finishes_also_on_failure_and_never_asks(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    codes = []
    with pytest.raises(RuntimeError, match="broken"), Tracker(tmp_path, {"a": 1}, "t") as tracker:
        finish = tracker.run.finish
        tracker.run.finish = lambda exit_code: (codes.append(exit_code), finish(exit_code))
        tracker.metrics({"a": {"b": 1.0}})
        tracker.table("t", ["x"], [[1]])
        raise RuntimeError("broken")
    assert codes == [1]
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    with pytest.raises(ConfigError, match="'loud'"):
        Tracker(tmp_path, {}, "t", mode="loud")
