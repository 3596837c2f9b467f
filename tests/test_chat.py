"""Streaming against `generate`, text that comes in pieces, and the conversation on a terminal or a pipe."""

import functools
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from patience import LAST_RESORT
from speed import quick
from test_export import a_run
from test_train import backend

from ple_jax import chat, modes
from ple_jax import main as entry
from ple_jax.backend import sharding
from ple_jax.core.errors import UserError
from ple_jax.core.types import Sampling
from ple_jax.models.tokenizer import byte_tokenizer

ROOT = Path(__file__).parent.parent
GREEDY = Sampling(20, (), temperature=0.0)

# ---------------------------------------------------------------- streaming


@pytest.fixture(scope="module")
def policy():
    return backend()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, tiny.CONFIG.vocab_size, length).tolist()


# 64 and 65: the two sides of a prompt bucket; 250: prompt and answer need the next cache bucket
@pytest.mark.parametrize("length", quick([1, 5, 64, 65, 250], 5, 65))
def test_greedy_stream_is_generate(policy, length):
    prompt = prompt_of(length)
    noise = np.zeros((1, 20), np.float32)
    expected = policy.generate([prompt], noise, sampling=GREEDY)[0].tokens
    assert tuple(policy.stream(prompt, noise[0], sampling=GREEDY)) == expected


def test_sampled_stream_is_generate(policy):
    prompt = prompt_of(9)
    noise = np.random.default_rng(1).random((1, 20), dtype=np.float32)
    sampling = Sampling(20, (), temperature=0.8, top_k=40, top_p=0.9)
    expected = policy.generate([prompt], noise, sampling=sampling)[0].tokens
    assert len(set(expected)) > 5
    assert tuple(policy.stream(prompt, noise[0], sampling=sampling)) == expected


def test_stream_of_the_base_is_an_adapter_of_zeros(policy):
    prompt, noise = prompt_of(9), np.zeros(20, np.float32)
    zeros = {p: {k: np.zeros_like(x) for k, x in m.items()} for p, m in tiny.random_adapter(tiny.CONFIG).items()}
    expected = backend(adapter=zeros).generate([prompt], noise[None], sampling=GREEDY)[0].tokens
    assert tuple(policy.stream(prompt, noise, sampling=GREEDY, base=True)) == expected
    assert tuple(policy.stream(prompt, noise, sampling=GREEDY)) != expected


def test_stream_ends_with_eos(policy):
    prompt, noise = prompt_of(9), np.zeros(20, np.float32)
    whole = list(policy.stream(prompt, noise, sampling=GREEDY))
    first = whole.index(whole[6])
    assert list(policy.stream(prompt, noise, sampling=GREEDY._replace(eos=(10_000, whole[6])))) == whole[: first + 1]


@pytest.mark.parametrize("scan", quick([False, True], True))
def test_stream_on_a_mesh(policy, scan):
    prompt, noise = prompt_of(9), np.zeros(20, np.float32)
    spread = backend(mesh=sharding.make_mesh(data=2, fsdp=2, tensor=2), scan=scan)
    expected = list(policy.stream(prompt, noise, sampling=GREEDY))
    assert list(spread.stream(prompt, noise, sampling=GREEDY)) == expected


@pytest.fixture
def compiled():
    """What is compiled while the test runs."""
    found: list[str] = []

    def listen(event: str, seconds: float, **about: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_turns_share_their_programs(policy, compiled):
    list(policy.stream(prompt_of(20), np.zeros(8, np.float32), sampling=GREEDY))
    compiled.clear()
    for length, new in ((21, 8), (40, 12), (60, 30)):  # a conversation that grows, and a longer /max
        sampling = GREEDY._replace(max_new_tokens=new, eos=(3,))
        list(policy.stream(prompt_of(length), np.zeros(new, np.float32), sampling=sampling))
    assert not compiled
    list(policy.stream(prompt_of(130), np.zeros(8, np.float32), sampling=GREEDY))  # a new prompt bucket, the same cache
    assert len(compiled) == 1


# ---------------------------------------------------------------- text in pieces


def spoken(data: bytes) -> list[str]:
    return list(chat.pieces(list(data), byte_tokenizer()))


def test_characters_appear_when_they_are_whole():
    assert spoken("né €😀!".encode()) == ["n", "é", " ", "€", "😀", "!"]


@pytest.mark.parametrize("data", [b"a\xe2\x82", b"\xff\xfe\xfd\xfc\xfb", b"\xf0\x9f\x98ok", b"\x80\xc3\xa9", b"", b"\xc3"])
def test_nothing_is_lost_or_repeated(data):
    """Bytes that never become a character: what Python's own decoder shows for them, in the end."""
    assert "".join(spoken(data)) == data.decode(errors="replace")


def test_special_tokens_are_not_shown():
    assert list(chat.pieces([104, 105, 256], byte_tokenizer())) == ["h", "i"]


def test_a_broken_character_does_not_hold_back_the_rest():
    shown = []
    for piece in chat.pieces(iter(b"\xff" * 10), byte_tokenizer()):
        shown.append(piece)
    assert len(shown) > 5  # not everything at the end


# ---------------------------------------------------------------- the conversation


class Model:
    """A backend's `stream` that answers with its name and how often it was asked; it keeps what it was asked."""

    def __init__(self):
        self.prompts: list[str] = []
        self.calls: list[tuple] = []

    def stream(self, prompt, uniforms, *, sampling, base=False):
        self.prompts.append(bytes(prompt).decode())
        self.calls.append((sampling, base, uniforms))
        yield from f"{'base' if base else 'adapter'} {len(self.prompts)}".encode()


def talk(*lines: str, model=None, template=True, context=1000) -> tuple[str, Model]:
    """What a conversation of these lines prints."""
    model, sampling = model or Model(), Sampling(50, (256,))
    tokenizer = byte_tokenizer()
    if not template:
        tokenizer.chat_template = None
    said: list[str] = []
    rest = iter(lines)

    def read() -> str:
        line = next(rest, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    chat.Chat(
        model.stream, tokenizer, sampling=sampling, principles="Be kind.", context=context, seed=0, write=said.append
    ).run(read)
    return "".join(said), model


def test_turns_build_a_conversation():
    said, model = talk("hello", "and you?")
    assert said == "adapter 1\nadapter 2\n\n"
    assert model.prompts == [
        "user: hello\nassistant: ",
        "user: hello\nassistant: adapter 1\nuser: and you?\nassistant: ",
    ]


def test_a_reasoning_model_is_asked_as_in_training():
    asked, tokenizer = [], byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{{ ' (think)' if enable_thinking else ' (at once)' }}"
    for thinking in (True, False):
        model = Model()
        talker = chat.Chat(
            model.stream, tokenizer, sampling=Sampling(50, (256,)), principles="", context=99, seed=0, thinking=thinking,
            write=lambda text: None,
        )  # fmt: skip
        talker.answer("hello")
        asked += model.prompts
    assert asked == ["hello (think)", "hello (at once)"]


def test_both_answer_with_the_same_noise_and_their_own_history():
    said, model = talk("/both", "one", "/base", "two")
    assert "base: base 1\nadapter: adapter 2\n" in said and said.endswith("base 3\n\n")
    assert model.prompts[:2] == ["user: one\nassistant: "] * 2
    assert model.prompts[2] == "user: one\nassistant: base 1\nuser: two\nassistant: "
    (_, first, noise), (_, second, same), (_, third, other) = model.calls
    assert (first, second, third) == (True, False, True)
    np.testing.assert_array_equal(noise, same)
    assert not np.array_equal(noise, other)


def test_principles_are_the_system_turn():
    _, model = talk("/principles on", "one", "/principles off", "two")
    assert model.prompts[0] == "system: Be kind.\nuser: one\nassistant: "
    assert model.prompts[1] == "user: one\nassistant: adapter 1\nuser: two\nassistant: "


@pytest.mark.parametrize(("lines", "template"), [(["/template off"], True), ([], False)])
def test_plain_continuation(lines, template):
    """The prompts of a run with task.chat=False: the line as it is, the principles before it; no turns."""
    _, model = talk(*lines, "one", "/principles on", "two", template=template)
    assert model.prompts == ["one", "Be kind.\n\ntwo"]


def test_reset_forgets():
    _, model = talk("one", "/reset", "two")
    assert model.prompts[1] == "user: two\nassistant: "


def test_settings():
    said, model = talk("/temperature 0", "/max 7", "one")
    assert "temperature 0, at most 7 tokens" in said
    sampling, _, noise = model.calls[0]
    assert sampling == Sampling(7, (256,), temperature=0.0) and noise.shape == (7,)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/principels on", "there is no /principels; did you mean '/principles'? (see /help)"),
        ("/principles", "'/principles' is not how /principles goes; see /help"),
        ("/temperature warm", "'/temperature warm': that value is not possible"),
        ("/temperature -1", "that value is not possible"),
        ("/temperature nan", "that value is not possible"),
        ("/max 0", "that value is not possible"),
        ("/max 1.5", "that value is not possible"),
        ("/", "there is no / (see /help)"),
        ("/help", "/both   who answers"),
    ],
)
def test_commands_say_what_is_wrong(line, says):
    said, model = talk(line, "still there")
    assert says in said and said.endswith("adapter 1\n\n") and len(model.prompts) == 1


def test_no_template_to_switch_on():
    said, _ = talk("/template on", template=False)
    assert "no chat template" in said


def test_an_answer_never_leaves_the_context():
    prompt = len("user: hi\nassistant: ")
    said, model = talk("hi", context=prompt + 20)
    assert model.calls[0][0].max_new_tokens == 20
    said, model = talk("hi", "/reset", "hi", context=prompt)
    assert said.count("the conversation is 20 tokens and the model takes 20; /reset forgets it") == 2 and not model.prompts


def test_quit_and_empty_lines():
    said, model = talk("", "  ", "/quit", "never asked")
    assert said == "" and not model.prompts


def test_ctrl_c_stops_the_answer_and_nothing_else():
    class Slow(Model):
        def stream(self, prompt, uniforms, **options):
            for i, token in enumerate(super().stream(prompt, uniforms, **options)):
                if len(self.prompts) == 1 and i == 3:
                    raise KeyboardInterrupt
                yield token

    said, model = talk("/both", "one", "/adapter", KeyboardInterrupt(), "two", model=Slow())
    assert "base: bas\n(stopped)\n" in said and "adapter 2" in said
    assert model.prompts[1] == "user: two\nassistant: "  # the adapter was not asked the first time
    model = Slow()
    talk("one", "two", model=model)
    assert model.prompts[1] == "user: one\nassistant: ada\nuser: two\nassistant: "  # what was said of it counts


# ---------------------------------------------------------------- the mode, on a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    return a_run(workdir), workdir


def test_mode_chat_on_a_pipe(run, monkeypatch, capsys):
    config, workdir = run
    monkeypatch.setattr("sys.stdin", io.StringIO("/temperature 0\n/max 12\n/template off\n/both\nHello\n"))
    assert modes.chat(config, workdir, "jax") == 0
    said = capsys.readouterr().out
    assert "tiny at iteration 2; /help lists the commands" in said
    assert "chat template off, temperature 1" in said and "trained on plain text, so what you type is continued" in said
    with modes.on_run(config, workdir, "jax") as (opened, _):
        prompt, noise = list(b"Hello"), np.zeros((1, 12), np.float32)
        greedy = Sampling(12, opened.base.eos, temperature=0.0)
        show = functools.partial(opened.base.tokenizer.decode, skip_special_tokens=True)
        adapter = show(opened.backend.generate([prompt], noise, sampling=greedy)[0].tokens)
        base = show(list(opened.backend.stream(prompt, noise[0], sampling=greedy, base=True)))
    assert said.endswith(f"base: {base}\nadapter: {adapter}\n\n") and base != adapter


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_export_and_chat_need_neither_the_config_nor_what_was_read(tmp_path, monkeypatch, capsys, framework):
    """Records, principles and reward of a run may be gone; the command says where the run is, and no more."""
    folder, workdir = tmp_path / "inputs", tmp_path / "run"
    folder.mkdir()
    data = ROOT / "ple_jax" / "data"
    for name in ("train", "heldout"):
        (folder / f"{name}.jsonl").write_bytes((data / f"tiny_{name}.jsonl").read_bytes())
    (folder / "rules.txt").write_text("Rules.\n1. Be kind.\n")
    (folder / "own.py").write_text("def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    own = [f"--config.task.{name}={folder / name}.jsonl" for name in ("train", "heldout")]
    own += [f"--config.principles={folder / 'rules.txt'}", f"--config.reward.name={folder / 'own.py'}:score"]
    small = ["--config.iterations=1", "--config.reward.kwargs={}", "--config.sinks=()"]
    command = ["ple_jax", "--workdir", str(workdir), f"--backend={framework}"]
    assert entry.main(entry.parse([*command, "--config=tiny", *own, *small])) == 0
    kept = (workdir / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder)
    shutil.rmtree(workdir / "adapter")
    capsys.readouterr()
    assert entry.main(entry.parse([*command[:3], "--mode=export"])) == 0  # the backend is the run's own, too
    assert (workdir / "adapter" / "adapter_model.safetensors").read_bytes() == kept
    monkeypatch.setattr("sys.stdin", io.StringIO("/max 4\n/principles on\nHello\n"))
    assert entry.main(entry.parse([*command[:3], "--mode=chat"])) == 0
    said = capsys.readouterr().out
    assert "rules.txt', are not there any more: /principles on adds nothing" in said and "principles on, chat" in said
    with pytest.raises(UserError, match="belongs to another config, differing in ple.tau_0"):
        entry.main(entry.parse([*command[:3], "--mode=export", "--config.ple.tau_0=0.7"]))
    for given in ((*command, "--config=tiny", *own, *small), command[:3]):  # what does read them says that they are gone
        with pytest.raises(UserError, match="existing"):
            entry.parse([*given, "--mode=evaluate"])


@pytest.mark.slow
def test_a_run_is_evaluated_by_its_own_config(tmp_path, capsys):
    workdir = tmp_path / "run"
    small = ["--config.iterations=1", "--config.sinks=()", "--config.seed=3", "--config.lora.targets=('q_proj','v_proj')"]
    command = ["ple_jax", "--workdir", str(workdir)]
    assert entry.main(entry.parse([*command, "--config=tiny", *small])) == 0
    capsys.readouterr()
    assert entry.main(entry.parse([*command, "--config=tiny", *small, "--mode=evaluate"])) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert entry.main(entry.parse([*command, "--mode=evaluate"])) == 0
    assert capsys.readouterr().out.splitlines()[-1] == said and "held-out reward" in said
    assert entry.main(entry.parse([*command, "--mode=generate", "--config.generate.samples=1"])) == 0
    with pytest.raises(UserError, match="--config=CONFIG is missing"):
        entry.parse([*command, "--mode=train"])


def test_a_line_that_is_no_utf8(run, monkeypatch, capsys):
    config, workdir = run
    typed = io.TextIOWrapper(io.BytesIO(b"/template off\ncaf\xe9\n/temperature 0\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    assert modes.chat(config, workdir, "jax") == 0
    assert "temperature 0," in capsys.readouterr().out


@pytest.mark.slow
def test_chat_frees_the_directory_and_outlives_ctrl_c(run):
    """A real signal in the middle of a long answer: the conversation goes on, and others may use the run meanwhile."""
    config, workdir = run
    code = (
        "import signal, sys, time; sys.path.insert(0, 'tests')\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "from pathlib import Path; from ml_collections import FrozenConfigDict\n"
        "from configs import tiny; from ple_jax import modes; from ple_jax.backend import backend\n"
        "load = backend.load; backend.load = lambda config: load(config)._replace(eos=())\n"
        "def endless(self, *prompt, sampling, stream=backend.JaxBackend.stream, **options):\n"
        "    yield from stream(self, *prompt, sampling=sampling, **options)\n"
        "    while sampling.max_new_tokens > 3: time.sleep(0.01)\n"  # an answer that does not end by itself
        "backend.JaxBackend.stream = endless\n"
        "c = tiny.get_config(); c.sinks = (); c.lora.rank, c.lora.alpha = 4, 6.0\n"
        f"c.model.adapter = {config.model.adapter!r}\n"
        f"sys.exit(modes.chat(FrozenConfigDict(c), Path({str(workdir)!r}), 'jax'))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    watch = threading.Timer(LAST_RESORT, process.kill)  # reads end when it does
    watch.start()
    try:

        def line() -> str:
            return process.stdout.readline().decode(errors="replace")

        def say(text: str) -> None:
            process.stdin.write(text.encode())
            process.stdin.flush()

        say("/max 2000\n/template off\n/temperature 0.1\n")
        while "temperature 0.1" not in line():
            assert process.poll() is None
        say("go\n")
        process.stdout.read(3)  # it speaks
        process.send_signal(signal.SIGINT)
        said = ""
        while "(stopped)" not in said:
            said += line()
            assert process.poll() is None
        with modes.on_run(config, workdir, "jax"):
            pass
        say("/max 3\nagain\n/quit\n")
        assert process.wait() == 0
        assert "at most 3 tokens" in process.stdout.read().decode(errors="replace")
    finally:
        watch.cancel()
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
