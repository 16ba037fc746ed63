"""The card of a run on the Hugging Face Hub: what it is, how good, how it was made, how to use it.

The metadata are huggingface_hub's, so that the Hub shows the result and leaderboards read it. Knows nothing of the transfer.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastppo.config import TrainConfig

NOT_SHOWN = ("preset", "env_id", "run_dir", "resume", "init_from", "plain", "verbose", "track", "track_project")


def model_card(repo: str, config: TrainConfig, summary: Mapping[str, Any], pictures: list[str]) -> str:
    """README.md of the repository: metadata, then text in Markdown. Needs huggingface_hub.

    Args:
        summary: of summary.json, with an evaluation.
        pictures: files of the repository to show, of curves and of a video that is a GIF.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    env_id = config.env_id.rpartition(":")[2]
    score = f"{summary['eval_return_mean']:.2f} +/- {summary['eval_return_std']:.2f}"
    result = EvalResult(
        task_type="reinforcement-learning",
        task_name="reinforcement-learning",
        dataset_type=env_id,
        dataset_name=env_id,
        metric_type="mean_reward",
        metric_name="mean_reward",
        metric_value=score,
    )
    data = ModelCardData(
        model_name="PPO",
        library_name="fastppo",
        tags=[env_id, "deep-reinforcement-learning", "reinforcement-learning", "fastppo", "ppo"],
        eval_results=[result],
    )
    text = "\n".join([f"# PPO on {env_id}", "", *_text(repo, config, summary, score, pictures), ""])
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _text(repo: str, config: TrainConfig, summary: Mapping[str, Any], score: str, pictures: list[str]) -> list[str]:
    made_with, versions = (summary.get(name) or {} for name in ("made_with", "versions"))
    imported = made_with.get("imported from")
    origin = f"imported from {imported}" if imported else "trained with [fastppo](https://pypi.org/project/fastppo)"
    lines = [
        f"An agent {origin}, after {summary['global_step']:,} steps. Return {score} in {summary['eval_episodes']} episodes "
        "with the most likely actions.",
        "",
        *(f"![{name}]({name})\n" for name in pictures),
        "## Use",
        "",
        "```python",
        "from fastppo import load_policy",
        "",
        f'policy = load_policy("hf://{repo}")  # reads data only',
        "action = policy.act(obs)",
        "```",
        "",
        "```bash",
        "pip install 'fastppo[hub]'",
        f"fastppo evaluate hf://{repo}",
        "```",
        "",
    ]
    if not imported:
        lines += [
            "## Train it again",
            "",
            "```bash",
            f"hf download {repo} config.json --local-dir {repo.partition('/')[2]}",
            f"fastppo train --preset {repo.partition('/')[2]}/config.json",
            "```",
            "",
        ]
    plain = asdict(TrainConfig())
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_SHOWN and value != plain[name]}
    lines += ["## Settings", "", f"Of `{config.env_id}`; all others are those of `TrainConfig()`.", "", "```json"]
    lines += [json.dumps(settings, indent=2), "```", ""]
    if versions:
        lines += ["## Versions", "", ", ".join(f"{name} {version}" for name, version in versions.items())]
    return lines
