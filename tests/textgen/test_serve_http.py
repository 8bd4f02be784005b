"""The server as clients see it: over a real socket, on loopback.

Longer than 300 lines: one server, started once, and all that clients ask of it.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_gradprune.errors import ConfigError, DataError
from tests.helpers.served import CONTEXT, until, write_model
from textgen.generate import Replier, Sampling

pytest.importorskip("fastapi", reason="needs the extra serve")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")

from labs.serve import Seen, _ask  # noqa: E402
from textgen.serve import command  # noqa: E402
from textgen.serve.template import PLAIN_TEMPLATE  # noqa: E402

KEY = "a key of many letters"


class Running:
    """A server in a thread of this process."""

    def __init__(self, folder: Path, *arguments: str, key: str | None = None) -> None:
        flags = command.parser().parse_args(["--model", str(folder), "--threads", "1", *arguments])
        app, self.engine, self.watcher = command.build(flags, key)
        self.name = self.engine.served.name
        self._socket = command._listen("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        config = uvicorn.Config(app, log_level="warning", lifespan="off", access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self.engine.start()
        self._thread.start()
        until(lambda: self._server.started)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.engine.close()
        self._socket.close()

    def send(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Any, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body)
        given = {"content-type": "application/json"} | {
            name.replace("_", "-"): text for name, text in headers.items()
        }
        connection.request(method, path, data, given)
        reply = connection.getresponse()
        text = reply.read()
        connection.close()
        is_json = "json" in reply.headers.get("content-type", "")
        return reply.status, json.loads(text) if is_json else text.decode(), reply.headers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("http") / "fox")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    running = Running(folder)
    yield running
    running.close()


@pytest.fixture(scope="module")
def replier(folder: Path) -> Replier:
    return Replier.load(str(folder), "cpu")


GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_greedy_text_equals_the_replys(server: Running, replier: Replier, path: str) -> None:
    body: dict[str, Any] = {"prompt": "the quick"}
    if path.startswith("chat"):
        body = {"messages": [{"role": "user", "content": "the quick"}]}
    status, reply, _ = server.send("POST", f"/v1/{path}", body | GREEDY)
    assert status == 200
    choice = reply["choices"][0]
    expected = replier.reply("the quick", Sampling(0.0, max_new_tokens=12))
    assert choice.get("text", choice.get("message", {}).get("content")) == expected
    assert reply["usage"]["completion_tokens"] == 12
    assert choice["finish_reason"] == "length"


def test_the_official_client_works(server: Running, replier: Replier) -> None:
    openai = pytest.importorskip("openai", reason="needs the openai package")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
        assert [card.id for card in client.models.list()] == [server.name]
        said: list[Any] = [{"role": "user", "content": "the lazy"}]
        whole = client.chat.completions.create(model=server.name, messages=said, **GREEDY)
        expected = replier.reply("the lazy", Sampling(0.0, max_new_tokens=12))
        assert whole.choices[0].message.content == expected
        pieces = list(
            client.chat.completions.create(
                model=server.name,
                messages=said,
                stream=True,
                stream_options={"include_usage": True},
                **GREEDY,
            )
        )
        text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
        assert text == expected
        assert len(pieces) > 5
        assert pieces[-1].usage.completion_tokens == 12
        old = client.completions.create(model=server.name, prompt="the lazy", **GREEDY)
        assert old.choices[0].text == expected
        with pytest.raises(openai.NotFoundError, match="model must be 'fox'"):
            client.completions.create(model="gpt-4", prompt="x")
        with pytest.raises(openai.BadRequestError, match="tools is not served"):
            client.chat.completions.create(
                model=server.name, messages=said, tools=[{"type": "function", "function": {}}]
            )


def test_a_stop_ends_the_reply_before_it(server: Running, replier: Replier) -> None:
    text = replier.reply("fox", Sampling(0.0, max_new_tokens=12))
    stop = text[4:7]
    _, reply, _ = server.send("POST", "/v1/completions", {"prompt": "fox", "stop": stop} | GREEDY)
    assert reply["choices"][0]["text"] == text[: text.index(stop)]
    assert reply["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens: Input should be greater"),
        ({"prompt": "x", "temperature": -1}, 400, "temperature: Input should be greater"),
        ({"prompt": "x", "n": 2}, 400, "n: Input should be 1"),
        ({"prompt": ["x", "y"]}, 400, "prompt: Input should be a valid string"),
        ({"prompt": "x", "logprobs": 3}, 400, "logprobs is not served"),
        ({"prompt": "x", "stop": ["a"] * 5}, 400, "stop: List should have at most 4"),
        (b"{broken", 400, "JSON"),
        ({"prompt": "x", "model": "other"}, 404, "model must be 'fox', got 'other'"),
        ({"prompt": "x" * 300_000}, 413, "the body must have at most 262144 bytes"),
    ],
)
def test_wrong_requests_are_told_in_one_line(
    server: Running, body: Any, status: int, message: str
) -> None:
    got, reply, _ = server.send("POST", "/v1/completions", body)
    assert (got, message in reply["error"]["message"]) == (status, True), reply
    assert "\n" not in reply["error"]["message"]


def test_pages_of_others_and_other_types_are_refused(server: Running) -> None:
    assert server.send("GET", "/v1/models", host="evil.example")[0] == 403
    assert server.send("POST", "/v1/completions", b"{}", content_type="text/plain")[0] == 415
    assert server.send("GET", "/v1/nothing")[0] == 404
    assert server.send("GET", "/v1/completions")[0] == 405


def test_a_chunked_body_is_limited_too(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as wire:
        wire.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
            b"\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        for _ in range(5):
            wire.sendall(chunk)
        assert wire.recv(64).startswith(b"HTTP/1.1 413")


def test_a_long_prompt_loses_its_beginning_and_says_so(server: Running) -> None:
    _, reply, _ = server.send("POST", "/v1/completions", {"prompt": "the fox " * 90} | GREEDY)
    assert reply["usage"]["prompt_tokens"] == CONTEXT - 12
    assert reply["usage"]["prompt_tokens_cut"] > 0


def test_health_metrics_and_page(server: Running) -> None:
    assert server.send("GET", "/health")[1]["status"] == "ok"
    status, text, headers = server.send("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    for line in text.splitlines():
        assert line.startswith("#") or (
            len(line.rsplit(" ", 1)) == 2 and float(line.split()[-1]) >= 0
        )
    assert 'ds_gradprune_serve_first_token_seconds_bucket{le="+Inf"}' in text
    assert "process_resident_memory_bytes" in text
    status, page, headers = server.send("GET", "/")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "http://" not in page
    assert "https://" not in page


def test_a_key_opens_everything_but_page_and_health(folder: Path) -> None:
    server = Running(folder, key=KEY)
    try:
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert server.send("GET", path)[0] == 401
            assert server.send("GET", path, authorization="Bearer no")[0] == 401
            assert server.send("GET", path, authorization=f"Bearer {KEY}")[0] == 200
        assert server.send("GET", "/", host="somewhere.example")[0] == 200
        assert server.send("GET", "/health")[0] == 200
    finally:
        server.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(folder: Path, stream: bool) -> None:
    server = Running(folder, "--max-batch", "1")
    slow = threading.Event()
    step = server.engine._batches[0].step

    def slowly() -> Any:
        slow.wait(0.05)
        return step()

    server.engine._batches[0].step = slowly
    try:
        body = json.dumps({"prompt": "fox", "max_tokens": 60, "temperature": 0, "stream": stream})
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as wire:
            head = (
                "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
            )
            wire.sendall(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
            until(lambda: server.engine.num_running == 1)
            if stream:
                assert wire.recv(64)
        until(lambda: server.engine.num_running == 0)
        until(lambda: 'replies_total{reason="cancelled"} 1' in server.send("GET", "/metrics")[1])
    finally:
        slow.set()
        server.close()


def test_a_reply_that_takes_too_long_is_a_504(folder: Path) -> None:
    server = Running(folder, "--timeout", "0.000001")
    try:
        for stream in (False, True):
            body = {"prompt": "fox", "stream": stream}
            status, reply, _ = server.send("POST", "/v1/completions", body)
            assert "longer than the server allows" in str(reply)
            assert status == 504 or stream  # a stream that has begun ends with the error
    finally:
        server.close()


def test_two_hundred_clients_all_get_an_answer(folder: Path) -> None:
    server = Running(folder, "--max-queue", "40", "--max-batch", "8")
    seen = Seen()
    body = {
        "messages": [{"role": "user", "content": "the fox"}],
        "max_tokens": 8,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }

    async def everybody() -> None:
        asks = [_ask(server.port, body, seen, time.perf_counter()) for _ in range(200)]
        await asyncio.wait_for(asyncio.gather(*asks), 60)

    try:
        asyncio.run(everybody())
        assert server.engine.num_running == server.engine.num_waiting == 0
    finally:
        server.close()
    assert (len(seen.firsts) + seen.refused, seen.errors, seen.dropped) == (200, 0, 0)
    assert len(seen.firsts) >= 48
    assert seen.tokens == 8 * len(seen.firsts)


def test_a_reload_drops_no_request(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "fox", seed=0)
    server = Running(folder, "--watch", "--max-queue", "300")
    seen = Seen()
    body = {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 30, "stream": True}
    body["stream_options"] = {"include_usage": True}

    async def everybody() -> None:
        async def one(number: int) -> None:
            for _ in range(4):
                await _ask(server.port, body, seen, time.perf_counter())

        tasks = [asyncio.create_task(one(number)) for number in range(12)]
        await asyncio.to_thread(write_model, folder, 1)
        await asyncio.to_thread(lambda: [server.watcher.look() for _ in range(2)])
        await asyncio.wait_for(asyncio.gather(*tasks), 60)

    before = server.engine.served.version
    try:
        asyncio.run(everybody())
        assert server.engine.served.version != before
    finally:
        server.close()
    assert (len(seen.firsts), seen.refused, seen.errors, seen.dropped) == (48, 0, 0, 0)


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "--model must be a model folder or a hub name"),
        (["--model", "x", "--host", "0.0.0.0"], "--host must be a loopback address without"),
        (["--model", "x", "--api-key", "short"], "--api-key must have at least 16"),
        (["--model", "x", "--port", "70000"], "must be a port from 0 to 65535"),
        (["--model", "x", "--max-queue", "0"], "must be a whole number >= 1"),
        (["--port", "1"], "the following arguments are required: --model"),
    ],
)
def test_faults_are_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--port" not in arguments:
        arguments += ["--port", "0"]
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_port_in_use_is_told() -> None:
    with command._listen("127.0.0.1", 0) as taken:
        with pytest.raises(ConfigError, match=r"--port must be free on 127\.0\.0\.1"):
            command._listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="--host must be an address of this machine"):
        command._listen("256.0.0.1", 0)


def test_the_plain_template_talks_as_reply_does(folder: Path) -> None:
    from textgen.serve.sources import open_source

    served = open_source(str(folder)).load(1024)
    assert served.tokenizer.chat_template == PLAIN_TEMPLATE
    turns = [("user", "one"), ("assistant", "1"), ("user", "two")]
    said = [{"role": role, "content": text} for role, text in turns]
    assert served.chat_text(said) == "one1\n\ntwo"


def test_a_run_serves_its_newest_checkpoint(tmp_path: Path) -> None:
    import torch

    from textgen.model import load_model
    from textgen.serve.sources import open_source

    run, model = tmp_path / "first", write_model(tmp_path / "start", seed=0)
    (run / "checkpoints" / "step00000004").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"--model": str(model)}))
    source = open_source(str(run))
    assert source.version() is None
    with pytest.raises(DataError, match="the run has written none yet"):
        source.load(1024)
    trained = load_model(str(write_model(tmp_path / "other", seed=5)))
    shutil.copytree(model, run / "data" / "tokenizer")
    (run / "checkpoints" / "latest").write_text("step00000004")
    with pytest.raises(DataError, match="ZeRO stage 3 spreads it"):
        source.load(1024)
    states = run / "checkpoints" / "step00000004" / "mp_rank_00_model_states.pt"
    torch.save({"module": trained.state_dict()}, states)
    served = source.load(1024)
    assert (served.name, served.version) == ("first", "step00000004")
    for name, weight in served.model.state_dict().items():
        assert torch.equal(weight, trained.state_dict()[name])
    shutil.copytree(tmp_path / "other", run / "model")
    os.utime(run / "checkpoints" / "latest", (1, 1))
    assert source.version() not in (None, "step00000004")
    states.write_bytes(b"cut")
    os.utime(run / "checkpoints" / "latest", (2e9, 2e9))
    with pytest.raises(DataError, match=r"The checkpoint .*step00000004 must be readable"):
        source.load(1024)


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end(folder: Path) -> None:
    words = [sys.executable, "-m", "textgen.serve.command", "--model", str(folder), "--port", "0"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("serving fox at http://127.0.0.1:"), line
        port = int(line.split("http://127.0.0.1:")[1].split()[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
        process.terminate()
        assert process.wait(20) in (0, -15)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.slow
def test_the_page_chats_in_a_browser(folder: Path, tmp_path: Path) -> None:
    from tests.helpers.devtools import Browser

    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("needs chromium")
    server = Running(folder)
    browser = Browser(program, tmp_path / "profile")
    step = server.engine._batches[0].step
    server.engine._batches[0].step = lambda: (time.sleep(0.02), step())[1]  # type: ignore[func-returns-value]
    try:
        browser.call("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
        until(lambda: "fox" in (browser.run("document.getElementById('model')?.textContent") or ""))
        browser.run("document.getElementById('temperature').value = 0")
        browser.run("document.getElementById('tokens').value = 50")
        browser.run("document.getElementById('text').value = 'the quick'")
        browser.run("document.getElementById('form').requestSubmit()")
        shown = "document.querySelector('.assistant')?.textContent || ''"
        lengths = set()

        def is_written() -> bool:
            lengths.add(len(browser.run(shown)))
            return bool(browser.run("document.querySelector('.facts') !== null"))

        until(is_written, 40)
        expected = Replier.load(str(folder), "cpu").reply("the quick", Sampling(0.0, 1.0, 50))
        assert browser.run(shown) == expected
        assert len(lengths) > 4, "the text came in pieces"
        assert browser.run("document.querySelectorAll('.error').length") == 0
        # A reply that was being written when a new chat began used to be the new one's first turn.
        browser.run("document.getElementById('text').value = 'the fox'")
        browser.run("document.getElementById('form').requestSubmit()")
        until(lambda: browser.run("document.querySelectorAll('.assistant')[1]?.textContent"))
        browser.run("document.getElementById('clear').click()")
        until(lambda: browser.run("running === null"))
        assert browser.run("messages.length") == 0
        assert browser.run("document.getElementById('talk').childElementCount") == 0
    finally:
        browser.close()
        server.close()
