"""What a recipe can say: frozen dataclasses, one for each table of the TOML file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

DEFAULT_RECIPE = "mobilenetv2-gru-small"


@dataclass(frozen=True)
class Data:
    """What is learnt from: the data spec, the picture size in pixels and how photos are brought to it."""

    spec: str = "scenes"
    image_size: int = 224
    resize: str = "squash"  # or "crop"
    resample: str = "bilinear"
    captions_per_photo: int = 5  # learnt in one step, drawn anew each time where a photo has more
    flip: bool = False  # also learn from mirrored photos; see [augment] for what becomes of "left" and "right"
    val_photos: int = 0  # validation photos used while training; 0 = all
    skip_bad: bool = False


@dataclass(frozen=True)
class Augment:
    """Varied views of each training photo, drawn once and cached; in every epoch a photo is seen in one view of all.

    views: how many are drawn beside the photo as it is (and mirrored, with data.flip, which mirrors every second one).
    crop: least share of the area that a view shows, 1 = all. rotate: degrees it is turned by at most. color_jitter: how
    much brightness, contrast and colour change at most (0.2: by 20%). sides: in the captions of a mirrored photo "left"
    and "right" are swapped, or captions that say so are dropped.
    """

    views: int = 0
    crop: float = 0.5
    rotate: float = 8.0
    color_jitter: float = 0.25
    sides: str = "swap"


@dataclass(frozen=True)
class TokenizerSettings:
    """kind: word, bpe (byte level) or unigram, learnt from the captions, or pretrained.

    min_count is for words, vocab_size an upper limit for what is learnt. source: hub id or directory of a pretrained
    one, empty = the decoder's source; ids: its bos, eos, pad and unk, filled in when a run begins. fill: unused entries
    up to vocab_size, so that a language model has its real size without its tokenizer.
    """

    kind: str = "word"
    source: str = ""
    ids: dict[str, Any] = field(default_factory=dict)
    fill: bool = False
    vocab_size: int = 8000
    min_count: int = 5
    max_length: int = 20  # tokens of a caption in training, end excluded


@dataclass(frozen=True)
class EncoderSettings:
    """kind: a name of the encoder table; source: hub id or directory with weights, empty = from scratch by `config`.

    features: the grid, or "pooled" into one vector. tile: side in pixels of the tiles that a photo is split into, with
    an overview of it; 0 = not split.
    """

    kind: str = "mobilenet_v2"
    source: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    features: str = "grid"
    tile: int = 0


@dataclass(frozen=True)
class Prompt:
    """What a language model reads in front of a caption, the photo at {image}; empty: the photo alone.

    chat: instead of `text`, what the user says; the tokenizer's chat template puts it into a dialogue.
    """

    text: str = ""
    chat: str = ""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the language model (Hu et al. 2021, arXiv:2106.09685); rank 0: none.

    targets: names of the layers that get one, comma separated, or all-linear; bits: 4 keeps the frozen weights in 4
    bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "all-linear"
    bits: int = 0


@dataclass(frozen=True)
class TextTower:
    """The frozen text encoder of a retrieval model: hub id or directory, or a transformers `config` from scratch.

    pool: how its states become one vector, the first (cls) or their mean; max_length: tokens of a caption it reads.
    dim: of the space where photos and texts meet; hidden: units of the layer between, 0 = none; dropout of the head.
    """

    source: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    pool: str = "cls"
    max_length: int = 32
    dim: int = 512
    hidden: int = 0
    dropout: float = 0.0


@dataclass(frozen=True)
class Decoding:
    """Decoding defaults that the bundle carries to the device (see runtime.decode)."""

    beam: int = 1
    max_length: int = 20
    min_length: int = 0
    length_penalty: float = 0.0
    no_repeat_ngram: int = 0


@dataclass(frozen=True)
class Stage:
    """One stretch of training. Stages follow each other, each starting from the best weights so far."""

    name: str = "words"
    objective: str = "xe"  # cross-entropy; scst (reward: CIDEr-D); distill (--teacher); guided (--critic); infonce
    epochs: int = 10
    batch_size: int = 64  # photos for each optimizer step, over all processes
    accumulate: int = 1  # split the batch into this many pieces
    lr: float = 1e-3
    encoder_lr: float = 0.0  # 0 = frozen encoder: its features are computed once and cached
    unfreeze_blocks: int = 0  # with encoder_lr: of the encoder only this many blocks, from the top, learn; 0 = all
    batchnorm: str = "auto"  # train, frozen, or auto: trained only where the encoder starts from scratch
    schedule: str = "cosine"  # constant, cosine, step, plateau
    warmup: int = 0  # optimizer steps from 0 to lr
    step_epochs: int = 3  # step: multiply by gamma every so many epochs
    gamma: float = 0.5  # step and plateau
    plateau_patience: int = 1
    weight_decay: float = 0.01
    clip: float = 1.0  # gradient norm; 0 = off
    label_smoothing: float = 0.1
    dropout: bool = True
    ema: float = 0.0  # decay of the weight average that is validated and kept; 0 = off
    patience: int = 0  # early stopping: validations without a better watched figure; 0 = off
    validate_every: int = 1
    keep_every: int = 0  # epochs between checkpoints that are kept under kept/; 0 = only the best and the last
    curriculum: int = 0  # epochs in which learning goes from the simplest captions to all; 0 = all from the start
    samples: int = 5  # scst: captions sampled per photo
    bleu: float = 0.0  # scst: weight of the sentence's BLEU-4 (on CIDEr's scale, 0 to 10) beside CIDEr-D's 1
    teacher_share: float = 0.7  # distill: of the loss that is the teacher's; the captions have the rest
    temperature: float = 2.0  # distill: softens both distributions
    top_k: int = 32  # distill: words of a teacher that are kept for each word of a caption; all others count as one
    teacher_captions: int = 0  # learnt beside a photo's own: the best so many of each --teacher's beam; 0 = off
    teacher_beam: int = 5  # captions that a teacher gives of a photo to choose from
    teacher_keep: float = 0.5  # share of the teachers' captions that are learnt, the best by CIDEr-D
    match: float = 0.0  # distill: weight of seeing the photo as the one teacher does, for encoders that learn
    alignment: float = 0.0  # guided: weight of what is said lying near its photo in the critic's space
    contrast: float = 0.0  # guided: weight of its lying nearer to its own photo than to the batch's others
    diversity: float = 0.0  # guided: weight of the captions of different photos lying apart


@dataclass(frozen=True)
class Recipe:
    """The whole file. task: caption, or retrieval: two towers, of photos and of texts, that meet in one space."""

    name: str = DEFAULT_RECIPE
    task: str = "caption"
    watch: str = (
        ""  # the validation figure that says what is best: cider, or alignment by --critic; "" = the task's own
    )
    seed: int = 0
    mixed_precision: str = "auto"  # bf16 or fp16 where the device has it; or no, bf16, fp16
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    bridge: dict[str, Any] = field(default_factory=lambda: {"kind": "linear"})
    decoder: dict[str, Any] = field(default_factory=lambda: {"kind": "gru"})
    prompt: Prompt = field(default_factory=Prompt)
    lora: Lora = field(default_factory=Lora)
    text: TextTower = field(default_factory=TextTower)
    decoding: Decoding = field(default_factory=Decoding)
    stages: tuple[Stage, ...] = (Stage(),)

    def to_dict(self) -> dict[str, Any]:
        return plain(dataclasses.asdict(self))

    def to_toml(self) -> str:
        import tomli_w

        return tomli_w.dumps(self.to_dict())


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down: what TOML and JSON hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value
