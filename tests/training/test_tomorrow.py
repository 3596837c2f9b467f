"""A chat template that asks for today's date: a run that goes on tomorrow has the prompts that it began with."""

import datetime

import chats
import pytest
from ml_collections import FrozenConfigDict
from test_baselines import config as configured
from test_resume import curve, outcome

from ple_jax import modes
from ple_jax.core import identity
from ple_jax.core.errors import UserError
from ple_jax.core.files import write_json
from ple_jax.training import workdir
from ple_jax.training.journal import read

CLOCK = (
    "{{ strftime_now('%d %b %Y') + '\n' }}{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
ONE_DAY, THE_NEXT = datetime.date(2026, 11, 28), datetime.date(2026, 11, 29)


@pytest.fixture
def on(monkeypatch):
    """Sets the clock, ours and that of transformers' templates."""
    chats.speak(monkeypatch, CLOCK)

    def clock(day):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(day.year, day.month, day.day)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        monkeypatch.setattr(workdir, "today", lambda: day)

    return clock


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_run_that_goes_on_tomorrow_is_the_same(on, tmp_path, backend):
    """Stopped in its second iteration, whose responses are in the journal already."""
    reward = tmp_path / "mine.py"
    reward.write_text(
        "import os\n\ndef reward(prompts, responses):\n"
        f"    if os.path.isdir({str(tmp_path / 'stop')!r}) and os.listdir({str(tmp_path / 'stop')!r}):\n"
        f"        left = os.listdir({str(tmp_path / 'stop')!r})\n"
        f"        os.remove(os.path.join({str(tmp_path / 'stop')!r}, left[0]))\n"
        "        if len(left) == 1:\n            raise ValueError('not today')\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    (tmp_path / "stop").mkdir()
    options = {"task__chat": True, "iterations": 2, "reward__name": f"{reward}:reward", "reward__kwargs": {}}
    config = FrozenConfigDict(configured("ple", **options))
    whole, cut, other = (tmp_path / name for name in ("whole", "cut", "other"))
    on(ONE_DAY)
    modes.train(config, whole, backend)
    for i in range(4):  # the evaluation before, an iteration, the evaluation after it, and the second iteration
        (tmp_path / "stop" / str(i)).touch()
    with pytest.raises(UserError, match="not today"):
        modes.train(config, cut, backend)
    assert (cut / "rollouts" / "iter_0001.partial.jsonl").exists()
    on(THE_NEXT)
    modes.train(config, cut, backend)
    assert outcome(cut) == outcome(whole) and curve(cut) == curve(whole)
    prompts = [rollout.prompt_tokens for i in range(2) for rollout in read(cut / "rollouts" / f"iter_{i:04d}.jsonl")]
    assert all(bytes(prompt).startswith(b"28 Nov 2026\nuser: ") for prompt in prompts)
    modes.evaluate(config, cut, backend)
    modes.train(config, other, backend)  # tomorrow's prompts are others
    assert outcome(other) != outcome(whole)


def test_every_mode_has_the_day_of_the_run(on, tmp_path, capsys):
    config = FrozenConfigDict(configured("ple", task__chat=True))
    on(ONE_DAY)
    modes.plan(config, tmp_path, "jax")
    assert "'28 Nov 2026\\n'" in capsys.readouterr().out
    began = workdir.begun(config, tmp_path, "jax")
    write_json(tmp_path / "config.json", identity.run_keys(began, "jax", {}), sealed=True)
    (tmp_path / "metrics.jsonl").write_text("")
    on(THE_NEXT)
    modes.plan(config, tmp_path, "jax")
    assert "'28 Nov 2026\\n'" in capsys.readouterr().out
