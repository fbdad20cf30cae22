"""Who samples GBA's completions: the policy in this process, or vLLM servers that get its adapter after each update."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmedexpert.errors import UserError
from mmedexpert.models.checkpoint import new_folder
from mmedexpert.models.encode import Encoder, Prompt
from mmedexpert.models.packing import pack, token_logps
from mmedexpert.runtime.ranks import gather, on_first, rank

if TYPE_CHECKING:  # what takes seconds to import
    from mmedexpert.engines.vllm import Servers
    from mmedexpert.models.generate import Completions

APART = 0.1  # ours: nats a token by which two engines may differ on average; bf16 against fp32 differs by 0.01
COMPARED = 8  # ours: completions of the first rollout that the policy reads again
PROBE_STD = 0.05  # ours: of the entries of B in an adapter that no server can overlook
KEPT = 2  # ours: versions of the adapter whose folders stay, for a server that is slow to read them


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled."""

    num_generations: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int


class Sampler(Protocol):
    """Samples `each` completions a prompt from the policy as it is now, by the prompt's seed."""

    def __call__(
        self, model: Any, encoder: Encoder, prompts: Sequence[Prompt], sampling: Sampling, each: int, seeds: list[int]
    ) -> Completions: ...

    def close(self) -> None:
        """No more is sampled, and what was is safe."""


class InProcess:
    """A Sampler: the policy itself (models/generate.py)."""

    def __call__(
        self, model: Any, encoder: Encoder, prompts: Sequence[Prompt], sampling: Sampling, each: int, seeds: list[int]
    ) -> Completions:
        from mmedexpert.models.generate import generate  # lazily, as models/backbone.py says
        from mmedexpert.training.fit import gathered

        with gathered(model):
            return generate(
                model, encoder, prompts, banned_ids=encoder.banned_ids, max_new_tokens=sampling.max_new_tokens,
                num_generations=each, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
                seeds=seeds,
            )  # fmt: skip

    def close(self) -> None:
        """Nothing was taken."""


IN_PROCESS = InProcess()


class Served:
    """A Sampler: vLLM servers of the model that the policy starts from, with the policy's own LoRA as an adapter.

    The adapter travels whenever its weights have changed, as a folder under `folder` that the servers can read, with a
    name that is used once (`name`, this process, a number). Before the first completion counts, the servers have shown
    that they serve the right model with room for every prompt (`longest` counts the tokens of the longest one), tell
    the right log-probabilities, apply an adapter, and agree with the policy.
    """

    def __init__(self, servers: Servers, folder: Path, name: str, longest: Callable[[], int]) -> None:
        self.servers, self.folder, self.longest = servers, folder, longest
        self.name = f"{name}-{gather(secrets.token_hex(3))[0]}"
        if rank() == 0:  # of a try that was killed
            for old in folder.glob(f"{name}-*") if folder.is_dir() else ():
                shutil.rmtree(old, ignore_errors=True)
        self.published: dict[str, Tensor] = {}
        self.folders: list[Path] = []
        self.compared = False

    def __call__(
        self, model: Any, encoder: Encoder, prompts: Sequence[Prompt], sampling: Sampling, each: int, seeds: list[int]
    ) -> Completions:
        """Raises UserError as `Servers` does, and where a server's model, adapter or prompts are not the policy's."""
        from mmedexpert.engines.completions import Asking
        from mmedexpert.engines.served import wanted_with
        from mmedexpert.models.generate import Completions

        if not self.published:
            on_first(lambda: self.servers.check(self.longest() + sampling.max_new_tokens))
        self._publish(model)
        wanted = wanted_with(encoder)
        asking = Asking(sampling.max_new_tokens, sampling.temperature, encoder.end_ids, encoder.banned_ids)
        drawn = self.servers.complete(
            [wanted(prompt, each, seed) for prompt, seed in zip(prompts, seeds, strict=True)], asking
        )
        rows = [one for group in drawn for one in group]
        device = next(model.parameters()).device
        lengths = torch.tensor([len(row.ids) for row in rows])
        ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True, padding_value=encoder.pad_id)
        logps = pad_sequence([torch.tensor(row.logps) for row in rows], batch_first=True)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        finished = torch.tensor([row.finished for row in rows])
        found = Completions(*(one.to(device) for one in (ids, mask, logps, finished)))
        if not self.compared:
            self._compare(model, encoder, prompts, each, found, sampling)
            self.compared = True
        return found

    def close(self) -> None:
        """Take the adapter from the servers, and its folders from the disk: the run's own are saved by now."""
        if rank() > 0:
            return
        if self.servers.adapter:
            self.servers.withdraw()
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _publish(self, model: Any) -> None:
        """Let the policy as it is now answer; all ranks gather its weights, rank 0 sends them."""
        from mmedexpert.training.fit import trained_weights

        weights = {name: weight.cpu().clone() for name, weight in trained_weights(model).items()}
        before = self.published
        if before and all(torch.equal(weight, before[name]) for name, weight in weights.items()):
            return
        if not before:
            probe = self._place()
            on_first(lambda: self._probe(model, weights, probe))
        self.published = weights
        place = self._place()
        on_first(lambda: self._send(model, weights, place))
        self.servers.adapter = (place.name, place)
        for old in self.folders[:-KEPT] if rank() == 0 else ():
            shutil.rmtree(old, ignore_errors=True)

    def _place(self) -> Path:
        self.folders.append(self.folder / f"{self.name}-v{len(self.folders)}")
        return self.folders[-1]

    def _send(self, model: Any, weights: dict[str, Tensor], place: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with new_folder(place, sum(weight.nbytes for weight in weights.values())) as new:
            model.save_pretrained(str(new), state_dict=weights)
        self.servers.publish(place.name, place)

    def _probe(self, model: Any, weights: dict[str, Tensor], place: Path) -> None:
        """UserError for a server that takes an adapter and does not apply it, as where its modules have other names."""
        drawn = torch.Generator().manual_seed(0)
        strong = {
            name: torch.randn(weight.shape, generator=drawn) * PROBE_STD if ".lora_B." in name else weight
            for name, weight in weights.items()
        }
        from mmedexpert.engines.served import refuse_silent

        self._send(model, strong, place)
        refuse_silent(self.servers, "the policy's adapter")

    @torch.no_grad()
    def _compare(
        self, model: Any, encoder: Encoder, prompts: Sequence[Prompt], each: int, found: Completions, sampling: Sampling
    ) -> None:
        """UserError where the policy and a server do not hold the same completions for about as likely; of each server
        the completions of one prompt are read again, on every rank as often: sharded layers are gathered by all."""
        images, count = [prompt.paths or (prompt.text,) for prompt in prompts], len(self.servers.servers)
        firsts = list(islice(cycle(images.index(one) for one in list(dict.fromkeys(images))[:count]), count))
        said = found.rows()
        was_training = model.training
        model.eval()
        for first in firsts:
            rows = range(first * each, first * each + min(each, COMPARED))
            packed = pack(model, encoder, [prompts[first]] * len(rows), [said[row] for row in rows])
            own, _, _ = token_logps(model, packed, sampling.temperature or 1.0, banned_ids=encoder.banned_ids)
            apart = float((own - found.logps[rows.start : rows.stop][packed.rows, packed.columns]).abs().mean())
            if not apart <= APART:
                raise UserError(
                    f"a server's model is not the policy: their log-probabilities differ by {apart:.2f} nats a token, "
                    f"and two engines of one model by less than {APART}: serve the folder of stage=serve, unchanged "
                    "and without quantisation"
                )
        model.train(was_training)
