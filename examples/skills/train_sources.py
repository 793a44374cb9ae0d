"""Source models: three small language models of three architectures, each best at other skills.

alpha (Llama) is the fusion target's first weights too: it sees more of all skills than the others do and is
the strongest overall, as the paper's target is. beta (MPT) and gamma (GPT-NeoX) each give 90 % of their
training to two skills.
"""

import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lm import (
    CACHE_FILE,
    Encoded,
    Packed,
    encode_chats,
    fingerprint,
    fit,
    pack,
    packed_losses,
    replace_directory,
    seed_all,
)
from make_tokenizers import STOP_TOKENS
from skills import FORMS, SKILLS, draw
from transformers import (
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

ROW_LENGTH = 192
ROWS_PER_STEP = 10
WIDTH, LAYERS, HEADS, POSITIONS = 64, 3, 4, 2048
# Short, brief, worked: what a source says when it is trained, hence when it is sampled.
FORM_WEIGHTS = (0.2, 0.5, 0.3)

#               addition weekday sorting reversing shifting conversion
MIXES = {
    "alpha": (0.335, 0.335, 0.07, 0.06, 0.12, 0.08),
    "beta": (0.025, 0.025, 0.45, 0.45, 0.025, 0.025),
    "gamma": (0.0175, 0.0175, 0.0175, 0.0175, 0.56, 0.37),
}


@dataclass(frozen=True)
class SourceSettings:
    """How a source is trained. Architecture, tokenizer and mix of skills are those of its name by default."""

    name: str
    steps: int
    seed: int
    lr: float = 7e-3
    family: str = ""  # whose architecture and tokenizer it has
    skills: str = ""  # whose mix of skills it sees
    forms: tuple[float, ...] = FORM_WEIGHTS

    @property
    def mix(self) -> tuple[float, ...]:
        return MIXES[self.skills or self.name]

    @property
    def built_as(self) -> str:
        return self.family or self.name

    def directory(self, output: Path) -> Path:
        return output / "sources" / self.name

    def hash(self, output: Path) -> str:
        here = Path(__file__)
        scripts = [here, here.with_name("lm.py"), here.with_name("skills.py")]
        return fingerprint(
            asdict(self) | {"torch": torch.__version__},
            *scripts,
            output / "tokenizers" / self.built_as / CACHE_FILE,
        )


ALPHA = SourceSettings("alpha", 900, 11)
BETA = SourceSettings("beta", 360, 12)
GAMMA = SourceSettings("gamma", 1000, 13)

# For the map of scenarios (scenarios.py). The target must be a Llama, so the weaker sources exist as Llamas
# too.
BETA_LLAMA = SourceSettings("beta_llama", 360, 14, family="alpha", skills="beta")
GAMMA_LLAMA = SourceSettings("gamma_llama", 1000, 15, family="alpha", skills="gamma")
# Sources that answer as fully as the ground truth does.
WORKED = (0.1, 0.2, 0.7)
ALPHA_WORKED = SourceSettings("alpha_worked", 900, 16, family="alpha", skills="alpha", forms=WORKED)
BETA_WORKED = SourceSettings("beta_worked", 360, 17, family="beta", skills="beta", forms=WORKED)
GAMMA_WORKED = SourceSettings("gamma_worked", 1000, 18, family="gamma", skills="gamma", forms=WORKED)


def build(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """An untrained model. The vocabulary is padded to a multiple of 64, as real models' often are."""
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    special["vocab_size"] = -(-len(tokenizer) // 64) * 64
    if name == "alpha":
        config = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=176,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=False,
            **special,
        )
        return LlamaForCausalLM(config)
    if name == "beta":
        return MptForCausalLM(
            MptConfig(
                d_model=WIDTH,
                n_heads=HEADS,
                n_layers=LAYERS,
                max_seq_len=POSITIONS,
                use_cache=True,
                **special,
            )
        )
    config = GPTNeoXConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        rotary_pct=0.5,
        **special,
    )
    return GPTNeoXForCausalLM(config)


def training_chats(
    tokenizer: PreTrainedTokenizerBase,
    stop_token: str,
    mix: tuple[float, ...],
    rows: int,
    rng: random.Random,
    forms: tuple[float, ...] = FORM_WEIGHTS,
) -> Packed:
    """Right answers to problems of the `train` split, enough for this number of packed rows.

    mix: weights of the skills. forms: weights of FORMS.
    """
    chats: list[Encoded] = []
    while True:
        pairs = []
        for skill in rng.choices(list(SKILLS), mix, k=2 * rows):
            problem = draw(skill, "train", rng)
            pairs.append((problem.instruction, problem.response(rng.choices(FORMS, forms)[0])))
        chats += encode_chats(tokenizer, stop_token, pairs)
        packed = pack(chats, ROW_LENGTH)
        if len(packed.ids) >= rows:
            return packed


def train_source(output: Path, settings: SourceSettings) -> None:
    rng = seed_all(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(
        output / "tokenizers" / settings.built_as, trust_remote_code=False
    )
    stop_token = STOP_TOKENS[settings.built_as]
    rows = settings.steps * ROWS_PER_STEP
    packed = training_chats(tokenizer, stop_token, settings.mix, rows, rng, settings.forms)
    model = build(settings.built_as, tokenizer)
    losses = packed_losses(model, packed, ROWS_PER_STEP)
    fit(model, losses, steps=settings.steps, lr=settings.lr, name=f"source {settings.name}")
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "pad_token_id")}
    model.generation_config.update(eos_token_id=tokenizer.convert_tokens_to_ids(stop_token), **special)
    with replace_directory(settings.directory(output), settings.hash(output)) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
