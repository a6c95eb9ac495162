"""What the steps of a run are made of: photos in their views, captions, and what teachers say of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer

from ...benchmarks.datasets import Dataset, Example
from ...runtime.progress import Progress
from ..checkpoint import preprocess_for
from ..models import CaptionModel
from ..optim import frozen_blocks
from ..settings import Recipe, Stage
from ..start import Helpers
from ..teachers.captions import teacher_captions
from ..teachers.words import TeacherTopK
from ..tokenizer import token_ids
from .augment import PLAIN, View, views_of
from .batches import Batch, EpochPlan, Photos, encode_captions, encoder_digest
from .curriculum import Curriculum
from .features import FeatureExtractor

MOST_CAPTIONS = 16  # of one photo


def seen_in(stage: Stage, trunk: int, views: int) -> str:
    """What a stage sees of its photos, in so many views: "features", the "trunk" of so many links, or "pixels"."""
    # The blocks above the trunk look at each photo once for every view, or once in every epoch: the fewer times.
    if not stage.encoder_lr and (not trunk or stage.epochs > views):
        return "features"
    return "trunk" if trunk else "pixels"


class Material:
    """The photos and captions of a run, opened for each stage, which then sees them as the model argument `sees`.

    For another task than captions, `texts` says what is learnt of a photo's captions; what else of them is needed,
    `open_photos` and `batch` bring.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: CaptionModel,
        tokenizer: Tokenizer,
        data: Dataset,
        accelerator: Accelerator,
        progress: Progress,
        helpers: Helpers,
    ) -> None:
        self.recipe, self.model, self.tokenizer, self.helpers = recipe, model, tokenizer, helpers
        self.accelerator, self.progress = accelerator, progress
        self.preprocess = preprocess_for(recipe)
        self.train = Photos(data, "train", recipe, self.preprocess)
        self.val = Photos(data, "val", recipe, self.preprocess, limit=recipe.data.val_photos)
        self.views = views_of(recipe)
        self.mirrored = np.array([view.mirrored for view in self.views])
        self.own = self.all_texts(self.train.examples)
        self.trunk = frozen_blocks(model.encoder, recipe.stages)

    def open(self, stage: Stage, number: int) -> dict[str, Any]:
        """For the stage of this number; returns what is to be told of its teachers' captions, if it has any."""
        self.number = number
        self.ids, told = self._open_captions(stage)
        self.open_photos(stage)
        seed = (self.recipe.seed, number)
        self.plan = EpochPlan(len(self.train), stage.batch_size, seed, views=len(self.views))
        self.curriculum = self._curriculum(stage)
        return told

    def captions(self, places: np.ndarray, views: np.ndarray, step: int) -> torch.Tensor:
        """What the photos at `places`, each in its view of `views`, are learnt with in a step: int64 [N, C, T]."""
        shown = np.where(self.mirrored[views][:, None, None], self.ids[-1][places], self.ids[0][places])
        if self.curriculum:
            shown = self.curriculum.show(shown, step)
        return torch.from_numpy(self.draw_captions(shown, step))

    def all_texts(self, examples: Sequence[Example], most: int = MOST_CAPTIONS) -> list[np.ndarray]:
        """`texts` of the photos as they are and, where they are seen so, mirrored."""
        return [self.texts(examples, mirrored, most) for mirrored in (False, True)[: 1 + self.mirrored.any()]]

    def texts(self, examples: Sequence[Example], mirrored: bool, most: int) -> np.ndarray:
        """What is learnt of each photo's captions, of at most so many: int64 [N, C, T] token ids, -1 behind the end."""
        most = min(most, max(len(example.captions) for example in examples))
        return encode_captions(
            examples, self.tokenizer, max_length=self.recipe.tokenizer.max_length, captions=most,
            ids=self.recipe.tokenizer.ids, mirrored=mirrored, sides=self.recipe.augment.sides,
        )  # fmt: skip

    def _open_captions(self, stage: Stage) -> tuple[list[np.ndarray], dict[str, Any]]:
        """What the stage learns to say, as `all_texts` gives it: the photos' own captions, and its teachers'; and what
        is to be told of those."""
        if not stage.teacher_captions:
            return self.own, {}
        device, captioners = self.accelerator.device, self.helpers.captioners
        with self.accelerator.main_process_first():
            more, figures = teacher_captions(self.train, captioners, stage, device=device, progress=self.progress)
        if stage.objective != "distill":  # else they may be asked at once what they say word by word
            for teacher in captioners:
                teacher.forget()
        pairs = zip(self.train.examples, more, strict=True)
        both = [Example(example.id, (*example.captions[:MOST_CAPTIONS], *texts)) for example, texts in pairs]
        return self.all_texts(both, MOST_CAPTIONS + max(map(len, more))), figures

    def open_photos(self, stage: Stage) -> None:
        """What of the photos can be computed once: the whole encoder where it is frozen, or its lower blocks that no
        stage trains, else the pixels. The first process fills the cache, the rest wait."""
        encoder, kind = self.model.encoder.eval(), self.recipe.encoder.kind
        encoder.trunk, self.sees = self.trunk, seen_in(stage, self.trunk, len(self.views))
        by, part = encoder, encoder
        if self.sees == "trunk":
            by, part = encoder.lower, torch.nn.ModuleList(encoder.chain[: self.trunk])
        extractor, key = FeatureExtractor(by, encoder), encoder_digest(encoder, kind, part)

        def rows(photos: Photos, view: View = PLAIN) -> np.ndarray:
            if self.sees == "pixels":
                return photos.pixels(view=view, progress=self.progress)
            return photos.seen(extractor, key, view=view, progress=self.progress)

        with self.accelerator.main_process_first():
            self.rows = [rows(self.train, view) for view in self.views]
            self.val_rows = rows(self.val)
            self.top_k = self._ask_teachers(stage) if stage.objective == "distill" else None
            self.teacher_rows = self._teacher_features() if self.top_k and stage.match else []
        needed = self.helpers.teachers[0].name if self.teacher_rows else None
        for teacher in (*self.helpers.teachers, *self.helpers.captioners):
            if teacher.name != needed:
                teacher.forget()

    def _ask_teachers(self, stage: Stage) -> TeacherTopK:
        """What the teachers say of all captions, of the photos as they are and mirrored."""
        rows = [
            [
                teacher.rows(
                    self.train, ids, mirrored=bool(mirrored), temperature=stage.temperature, top_k=stage.top_k,
                    device=self.accelerator.device, progress=self.progress,
                )
                for mirrored, ids in enumerate(self.ids)
            ]
            for teacher in self.helpers.teachers
        ]  # fmt: skip
        return TeacherTopK(self.ids, rows)

    def _teacher_features(self) -> list[np.ndarray]:
        """What the one teacher sees in each view, for a captioner that learns to see so."""
        (teacher,) = self.helpers.teachers
        seer, photos = teacher.model.get(self.accelerator.device).encoder, self.train.shown_in(teacher.preprocess)
        key, extractor = encoder_digest(seer, teacher.encoder), FeatureExtractor(seer, seer)
        return [photos.seen(extractor, key, view=view, progress=self.progress) for view in self.views]

    def draw_captions(self, ids: np.ndarray, step: int) -> np.ndarray:
        """[N, all, T] → [N, C, T]: as many captions of each photo as the recipe says, others in another step."""
        wanted, empty = self.recipe.data.captions_per_photo, ids[:, :, 0] < 0
        if ids.shape[1] <= wanted and (empty[:, :-1] <= empty[:, 1:]).all():  # a photo's captions come first
            return ids
        order = np.random.default_rng([self.recipe.seed, self.number, step]).random(ids.shape[:2])
        order[empty] = 2.0  # empty rows last
        return np.take_along_axis(ids, order.argsort(1)[:, :wanted, None], 1)

    def _curriculum(self, stage: Stage) -> Curriculum | None:
        if not stage.curriculum:
            return None
        special = token_ids(self.tokenizer, self.recipe.tokenizer.ids)
        steps = stage.curriculum * self.plan.batches
        return Curriculum(self.ids[0], steps, eos=special["eos"], unk=special["unk"])

    def batch(self, ids: torch.Tensor, places: np.ndarray, views: np.ndarray) -> Batch:
        """The photos at `places`, each in its view of `views`, with the `captions` drawn for them."""

        def seen(rows: list[np.ndarray]) -> torch.Tensor:
            tensor = torch.from_numpy(np.stack([rows[view][place] for view, place in zip(views, places, strict=True)]))
            return tensor.float() if tensor.is_floating_point() else tensor

        photos = {self.sees: seen(self.rows)}
        teacher = seen(self.teacher_rows) if self.teacher_rows else None
        mirrored = self.mirrored[views]
        words = self.top_k.of(ids.numpy(), places, mirrored) if self.top_k else {}
        batch = Batch(ids, places, teacher=teacher, mirrored=mirrored, **photos, **words)
        return batch.to(self.accelerator.device)
