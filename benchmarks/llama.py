"""A model of Llama's shape of transformers, trained here on short stories, and what each method makes of it.

python benchmarks/llama.py --json benchmarks/results/llama.json

The stories are those of `stories.py`: the first 64 are to judge by, the others to train and to calibrate with. They are
few, so the model learns from the probabilities that stories260K gives to the next token, not from that token alone.
The head is tied to the embedding and is left out by all methods, as in the papers on language models.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import stories
import torch
from accuracy import METHODS as PLAIN
from common import count_flops, write_json
from tabulate import tabulate
from task import Source
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import balf_fx

LENGTH = 256
BATCH_SIZE = 8
CALIBRATION = 48  # sequences


def next_token(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of training a language model, which needs no labels but the text itself."""
    return F.cross_entropy(output["logits"][:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


METHODS: Mapping[str, Mapping[str, Any]] = {
    "svd": PLAIN["svd"],
    "svd-llm": PLAIN["svd-llm"],
    "balf": PLAIN["balf"],
    "air": PLAIN["air"],
    "air, labels": {**PLAIN["air"], "loss": next_token},
    "mlp": {"include": ["*mlp*"], "dense": ["*"]},
    "ours": {},
}
"""Keyword arguments of `balf_fx.compile`: "mlp" only makes the hidden layers of the MLPs narrower."""


@dataclass(frozen=True)
class Row:
    """One compressed model; the shares are counted on it."""

    method: str
    budget: float
    perplexity: float
    params_kept: float
    flops_kept: float


def build(width: int = 96, hidden: int = 288, layers: int = 3) -> LlamaForCausalLM:
    """The model before it is trained."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=stories.LENGTH,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=None,
        )
    )


def train(model: nn.Module, teacher: nn.Module, sequences: Tensor, epochs: int) -> None:
    """Train on sequences [N, T] with the teacher's probabilities, in epochs of random order; then evaluation mode."""
    batches = -(-len(sequences) // BATCH_SIZE)
    with torch.no_grad():
        wanted = torch.cat([teacher(batch).softmax(-1) for batch in sequences.split(BATCH_SIZE)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * batches, pct_start=0.1)
    model.train()
    for _ in tqdm(range(epochs), unit="epoch", leave=False):
        for chosen in torch.randperm(len(sequences)).split(BATCH_SIZE):
            logits = model(input_ids=sequences[chosen]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), wanted[chosen].flatten(0, 1))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def perplexity(model: nn.Module, texts: Sequence[Tensor]) -> float:
    """The perplexity of texts, each [1, T], over all of their tokens but the first."""
    nats = [F.cross_entropy(model(input_ids=text).logits[0, :-1], text[0, 1:], reduction="sum") for text in texts]
    return float((torch.stack(nats).sum().double() / sum(text.shape[1] - 1 for text in texts)).exp())


def compress(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], method: str, budget: float) -> nn.Module:
    """A smaller model; a budget that is out of reach gives the closest that is not."""
    options = {"params": budget, "strict": False, "progress": False, "result": "module", **METHODS[method]}
    options |= {} if "include" in options else {"exclude": ["lm_head*"]}
    return balf_fx.compile(model, batches, **options)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="The folder with the stories and their tokenizer.")
@click.option("--epochs", default=12, show_default=True, help="How often the stories are seen in training.")
@click.option("--seed", default=0, show_default=True)
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="Repeatable; default: all.")
@click.option("--params", multiple=True, type=float, default=(0.8, 0.6, 0.4), show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results here.")
def main(
    data: Path | None, epochs: int, seed: int, methods: tuple[str, ...], params: tuple[float, ...], output: Path | None
) -> None:
    """Train the model, compress it with each method to each share of its parameters, and print perplexities."""
    torch.manual_seed(seed)
    source = Source(data=data, seed=seed)
    told = json.loads(source.file("tinystories_sample.json").read_text())
    texts = [torch.tensor(stories.Tokenizer(source.file("tok512.bin")).encode(text)) for text in told]
    judged = [text[None, :LENGTH] for text in texts[: stories.EVALUATION_STORIES]]
    stream = torch.cat(texts[stories.EVALUATION_STORIES :])
    sequences = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    model = build()
    train(model, source.load_weights(stories.Llama(), "stories260K.pth"), sequences, epochs)
    batches = [{"input_ids": batch} for batch in sequences[:CALIBRATION].split(BATCH_SIZE)]
    flops, size = count_flops(model, batches[0]), model.num_parameters()
    dense = {"perplexity": perplexity(model, judged), "params": size, "flops": flops, "epochs": epochs}
    rows: list[Row] = []
    for method, budget in tqdm(list(itertools.product(methods or METHODS, params)), unit="model", leave=False):
        small = compress(model, batches, method, budget)
        kept = sum(parameter.numel() for parameter in small.parameters()) / size
        flops_kept = count_flops(small, batches[0]) / flops
        rows.append(Row(method, budget, perplexity(small, judged), kept, flops_kept))
        if output is not None:
            write_json(output, {"dense": dense, "results": [asdict(row) for row in rows]})
    click.echo(f"dense: {size:,} parameters, perplexity {dense['perplexity']:.2f}\n")
    cells = {(row.method, row.budget): f"{row.perplexity:.2f} ({row.params_kept:.3f})" for row in rows}
    lines = [[method, *(cells[method, budget] for budget in params)] for method in methods or METHODS]
    click.echo(tabulate(lines, ["perplexity (kept)", *(f"{budget:g}" for budget in params)], disable_numparse=True))


if __name__ == "__main__":
    main()
