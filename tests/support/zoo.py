"""Every family that transformers offers, by a small random model of its configuration's class, and what to ask it."""

import copy
import inspect
import re

import torch
from transformers import set_seed

ROWS, LENGTH = 2, 21
PACKED = torch.cat([torch.arange(9), torch.arange(12)])[None]  # position_ids
REAL = {
    "left": torch.arange(LENGTH) >= torch.tensor([0, 8])[:, None],
    "right": torch.arange(LENGTH) < torch.tensor([LENGTH, 12])[:, None],
}
LARGEST = 15e6  # parameters
SIZES = {  # of a configuration's numbers, by the end of their names
    "vocab_size": 199,
    "max_position_embeddings|n_positions|n_ctx|max_source_positions|max_target_positions|max_seq_len": 512,
    "num_key_value_heads|n_head_kv|num_kv_heads": 2,
    "num_attention_heads|num_heads|n_head|n_heads|attention_heads": 4,
    "num_hidden_layers|num_layers|n_layer|n_layers|encoder_layers|decoder_layers|depth|num_blocks": 2,
    "num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts|moe_top_k|experts_per_token": 2,
    "num_experts|num_local_experts|n_routed_experts|moe_num_experts": 4,
    "n_group|topk_group": 1,
    "rotary_dim|qk_nope_head_dim|v_head_dim|head_dim|d_kv|kv_channels|attention_head_dim|head_size": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank|kv_lora_rank": 16,
    "intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|mlp_dim|dim_feedforward|inner_dim|d_inner": 64,
    "hidden_size|d_model|n_embd|embed_dim|dim|model_dim|hidden_dim|embedding_size|projection_dim|emb_dim|width": 64,
    "word_embed_proj_dim|feat_dim|projection_size|output_dim|embedding_dim|lm_embedding_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
SIZES = {re.compile(rf"(^|_)({names})$"): size for names, size in SIZES.items()}
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, sep_token_id=2, cls_token_id=1)


class NotHere(Exception):
    """Why a family, or what is asked of it, is not tested."""


def changes(kind: type) -> dict:
    """That make a configuration small, nested ones too."""
    default = kind()
    mine, free = {}, iter(range(185, 0, -1))
    for name, value in vars(default).items():
        if name in TOKENS and type(value) is int:
            mine[name] = TOKENS[name]
        elif name.endswith(("_token_id", "_token_index")):
            mine |= {name: next(free)} if type(value) is int and value > 149 else {}
        elif type(value) is int and value > 0:
            mine[name] = min([value, *(size for pattern, size in SIZES.items() if pattern.search(name))])
        elif isinstance(value, dict) and "rope_type" in value:
            half = int(8 * value.get("partial_rotary_factor", 1.0))  # of a head dim of 16
            mine[name] = value | dict(mrope_section=[half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8])
        elif type(value) is float and re.search("drop", name):
            mine[name] = 0.0
    for name in kind.sub_configs:
        if (sub := getattr(default, name, None)) is not None:
            mine[name] = changes(type(sub)) | dict(model_type=sub.model_type)
    if "kv_lora_rank" in mine:  # latent attention has a key of each head
        mine |= dict(num_key_value_heads=4) | ({"head_dim": 8} if "head_dim" in mine else {})
    if getattr(default, "is_encoder_decoder", False) and getattr(default, "decoder_start_token_id", None) is None:
        mine["decoder_start_token_id"] = 1
    return mine


def model_of(kind: type) -> type:
    """The first that the auto classes have for a configuration: one that generates, where there is one."""
    from transformers.models.auto import modeling_auto as auto

    names = ["CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MASKED_LM"]
    if getattr(kind(), "is_encoder_decoder", False):
        names = names[1:]
    maps = [getattr(auto, f"MODEL_FOR_{name}_MAPPING") for name in names]
    for mapping in (*maps, auto.MODEL_MAPPING):
        if kind in mapping:
            model = mapping[kind]
            return model[0] if isinstance(model, tuple) else model
    raise NotHere("the auto classes have no model for it")


def small(kind: type) -> tuple[type, object]:
    """A family's model class, and a small configuration."""
    try:
        model = model_of(kind)
        config = kind(**changes(kind))
        with torch.device("meta"):
            size = sum(x.numel() for x in model(copy.deepcopy(config)).parameters())
    except NotHere:
        raise
    except Exception as error:  # what shrinks most does not fit some
        raise NotHere(f"not built small: {type(error).__name__}: {str(error).strip()[:80]}") from error
    if size > LARGEST:
        raise NotHere(f"{size / 1e6:.0f} million parameters")
    return model, config


def build(model: type, config, implementation: str):
    """Random weights, large enough for attention to choose."""
    torch.manual_seed(0)
    made = model._from_config(copy.deepcopy(config), attn_implementation=implementation, dtype=torch.float32).eval()
    with torch.no_grad():
        for x in made.parameters():
            x.mul_(2) if x.dim() > 1 and x.is_floating_point() else None
    return made


def inputs(model) -> dict[str, torch.Tensor]:
    """Tokens where it takes any, else what its main input is: pixels, spectra or samples."""
    takes, config, draw = inspect.signature(model.forward).parameters, model.config, torch.Generator().manual_seed(0)
    given = {}
    if "input_ids" in takes:
        given["input_ids"] = torch.randint(3, 150, (ROWS, LENGTH), generator=draw)
        given["input_ids"][:, [11, 20]] = TOKENS["eos_token_id"]  # at the end of each row, of which some make a summary
    elif model.main_input_name == "input_features":
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 80
        whole = config.model_type in ("whisper", "qwen2_audio_encoder")
        shape = (bins, 2 * config.max_source_positions) if whole else (64, bins)
        given["input_features"] = torch.randn(ROWS, *shape, generator=draw)
    elif model.main_input_name == "input_values":
        given["input_values"] = torch.randn(ROWS, 4000, generator=draw)
    vision = getattr(config, "vision_config", None) or config
    two_towers = vision is not config and not model.can_generate()
    if "pixel_values" in takes and (two_towers or "input_ids" not in takes or model.main_input_name == "pixel_values"):
        size = getattr(vision, "image_size", 32) or 32
        size = size if isinstance(size, (list, tuple)) else (size, size)
        given["pixel_values"] = torch.randn(ROWS, getattr(vision, "num_channels", 3) or 3, *size, generator=draw)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        given["decoder_input_ids"] = torch.randint(3, 150, (ROWS, 13), generator=draw)
    return given


def answer(out) -> torch.Tensor:
    found = [out.get("logits"), out.get("last_hidden_state"), *out.values()]
    found = [x for x in found if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if not found:
        raise NotHere("it gives no tensor")
    return found[0]


def padded(model, given, side) -> dict[str, torch.Tensor]:
    if "input_ids" not in given or "attention_mask" not in inspect.signature(model.forward).parameters:
        raise NotHere("takes no mask of tokens")
    return given | dict(input_ids=given["input_ids"].where(REAL[side], 0), attention_mask=REAL[side].long())


def prefill(model, given, side=None):
    out = answer(model(**(padded(model, given, side) if side else given)))
    return out[REAL[side]] if side and out.shape[:2] == (ROWS, LENGTH) else out


def generate(model, given, side=None, **how):
    if not model.can_generate() or "input_ids" not in given:
        raise NotHere("does not generate")
    how |= {} if side is None else dict(attention_mask=REAL[side].long())
    given = {name: x for name, x in given.items() if name != "decoder_input_ids"}
    steps = dict(do_sample=False, min_new_tokens=4, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
    return torch.stack(model.generate(**given, **how, **steps).logits, 1)


def pack(model, given):
    if set(given) != {"input_ids"} or "position_ids" not in inspect.signature(model.forward).parameters:
        raise NotHere("takes no positions")
    return answer(model(input_ids=given["input_ids"][:1], position_ids=PACKED, use_cache=False))


def chunks(model, given):
    if set(given) != {"input_ids"} or not model.can_generate():
        raise NotHere("has no cache")
    first = model(input_ids=given["input_ids"][:, :9], use_cache=True)
    cache = first.get("past_key_values", first.get("cache"))
    if cache is None:
        raise NotHere("has no cache")
    rest = model(input_ids=given["input_ids"][:, 9:], past_key_values=cache, use_cache=True)
    return torch.cat([answer(first), answer(rest)], 1)


@torch.enable_grad()
def train(model, given, side=None):
    """Gradients of all weights, of a sum of the outputs by random factors, that no normalisation makes constant."""
    model.zero_grad()
    model.train()
    out = prefill(model, given, side)
    (out.float() * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).mean().backward()
    model.eval()
    return torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None])


STATIC = dict(cache_implementation="static", disable_compile=True)
QUESTIONS = {
    "prefill": prefill,
    "left padding": lambda *x: prefill(*x, "left"),
    "right padding": lambda *x: prefill(*x, "right"),
    "generation": generate,
    "generation behind left padding": lambda *x: generate(*x, "left"),
    "generation with a static cache": lambda *x: generate(*x, "left", **STATIC),
    "packed rows": pack,
    "chunks": chunks,
    "training": train,
    "training with right padding": lambda *x: train(*x, "right"),
}


def ask(question: str, model, given) -> torch.Tensor:
    set_seed(0)
    with torch.no_grad():
        return QUESTIONS[question](model, given)
