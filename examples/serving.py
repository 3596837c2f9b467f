"""Serving: the same questions to all models of a server, side by side: the base and the adapter that a run exported.

    ple_jax --workdir runs/short --mode=export           # prints the line that starts vLLM with base and adapter
    python examples/serving.py http://localhost:8000 "What is a train?" "What is gold?"

Any server that speaks OpenAI's chat protocol will do: vLLM, or `transformers serve` for merged weights. Models go by the
names that the server gives them; vLLM's `--lora-modules NAME=FOLDER` and `--served-model-name NAME` choose these.
"""

import sys

import requests

_PATIENCE = 300  # seconds: a CPU takes its time for the first answer


def models(server: str) -> list[str]:
    """Returns the names that the server answers to."""
    answer = requests.get(f"{server}/v1/models", timeout=_PATIENCE)
    answer.raise_for_status()
    return [model["id"] for model in answer.json()["data"]]


def ask(server: str, model: str, question: str) -> str:
    """Returns a model's greedy answer to a question."""
    request = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 60, "temperature": 0}
    answer = requests.post(f"{server}/v1/chat/completions", json=request, timeout=_PATIENCE)
    answer.raise_for_status()
    return answer.json()["choices"][0]["message"]["content"].strip()


def main(server: str, questions: list[str]) -> None:
    """Prints every question with the answer of each model."""
    names = models(server)
    for question in questions:
        print(f"\n{question}")
        for name in names:
            print(f"  {name}: {ask(server, name, question)}")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), sys.argv[2:])
