"""The code of a model card: a student's network in 20 lines of torch, for people who do not have this project.

Written for the student at hand: what it does not have is not there. Exact, not fast; `g` is the noise as the student sees it, of `medusa`
the heads alone, which read the hidden states of a backbone that is loaded by its own library.
"""

from __future__ import annotations

from trainer.backbone import NORM_EPS, ROPE_BASE
from trainer.config import NoiseConfig
from trainer.students.base import Base

_LOADED = "import safetensors.torch, torch, torch.nn.functional as F; w, V = safetensors.torch.load_file('model.safetensors')"
_NOISE = {"gumbel": "Gumbel(0, 1)", "independent": "Gumbel(0, 1)", "gaussian": "standard normal", "uniform": "uniform on (0, 1)"}


def lines_of(student: Base) -> str:
    """Python source that defines `logits`, to be run in the exported folder."""
    lines = _medusa(student) if student.config.kind == "medusa" else [*_start(student), *_layer(student), *_logits(student)]
    return "\n".join(lines)


def _scaled(x: str) -> str:
    """The readout's scale times the noise."""
    return f'F.softplus(F.linear({x}, w[name + ".scale.weight"], w[name + ".scale.bias"])) * g'


def _start(student: Base) -> list[str]:
    config = student.config
    norm = (
        'layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"]'
        if config.backbone == "dit"
        else 'rms_norm(x, x.shape[-1:], w[name + ".weight"]'
    )
    head = 'F.linear(norm(x, "model.norm"), ' + ("E[:V])" if config.tied else 'w["model.output.weight"][:V], w["model.output.bias"][:V])')
    return [
        f"{_LOADED}, {student.vocab_size}; E = w['model.embed_tokens.weight']",
        f"def norm(x, name): return F.{norm}, eps={NORM_EPS})",
        "def turn(x, angle): return x * angle.cos() + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * angle.sin()",
        f"def read(x, g, name): return {head} + {_scaled('x')}" if _reads(student) else f"def head(x): return {head}",
    ]


def _reads(student: Base) -> bool:
    return student.noise.readout or (student.noise.kind != "none" and bool(student.noise.drafts))


def _layer(student: Base) -> list[str]:
    heads = student.config.heads
    apart = f".unflatten(-1, ({heads}, -1)).transpose(1, 2) for"
    attended = "F.scaled_dot_product_attention(turn(q, angle), turn(k, angle), v, mask).transpose(1, 2).flatten(2)"
    if student.config.backbone == "dit":
        return [
            "def layer(x, angle, mask, p):",
            f'    q, k, v = (y{apart} y in F.linear(norm(x, p + "norm1"), w[p + "attn_qkv.weight"]).chunk(3, -1))',
            f'    x = x + F.linear({attended}, w[p + "attn_out.weight"])',
            '    y = F.gelu(F.linear(norm(x, p + "norm2"), w[p + "mlp.0.weight"], w[p + "mlp.0.bias"]), approximate="tanh")'
            '; return x + F.linear(y, w[p + "mlp.2.weight"], w[p + "mlp.2.bias"])',
        ]
    return [
        "def layer(x, angle, mask, p):",
        f'    q, k, v = (F.linear(norm(x, p + "input_layernorm"), w[f"{{p}}self_attn.{{n}}_proj.weight"]){apart} n in "qkv")',
        f'    x = x + F.linear({attended}, w[p + "self_attn.o_proj.weight"])',
        '    a, b = (F.linear(norm(x, p + "post_attention_layernorm"), w[f"{p}mlp.{n}_proj.weight"]) for n in ("gate", "up"))'
        '; return x + F.linear(F.silu(a) * b, w[p + "mlp.down_proj.weight"])',
    ]


def _logits(student: Base) -> list[str]:
    config, noise = student.config, student.noise
    width, leads = config.hidden // config.heads, config.kind == "bd3lm" and config.shift
    known = f'.flatten(0, 1).index_add(0, known, w["input.known_scale"] * ({_seen(noise, "h", "E")})).view(*ids.shape, -1)' if noise.known else ""
    lines = [_signature(student), f"    place, x = torch.arange(ids.shape[1]), E[ids]{known}"]
    if leads:  # the block after s begins with the token before it: [clean positions up to s; the token before s; the block]
        size = config.block_size
        lines.append(
            f"    s = int((ids[0] == {student.vocab_size}).int().argmax()) // {size} * {size}; to = torch.cat((place[:s], place[max(s - 1, 0):]))"
        )
        lines.append(f"    ids, x, place, block = ids[:, to], x[:, to], to, torch.cat((place[:s], to[s:].clamp_min(s))) // {size}")
    angle = f"torch.outer(place.float(), {ROPE_BASE} ** (-torch.arange(0, {width}, 2) / {width})).repeat(1, 2)"
    lines.append(f"    where, start, angle = (ids.flatten() == {student.vocab_size}).nonzero()[:, 0], x, {angle}")
    if noise.input != "none":
        seen = _seen(noise, "g", "E") + (" + E[V]" if noise.input == "add" else "")
        lines.append(f"    x = x.flatten(0, 1).index_copy(0, where, {seen}).view_as(x)")
    mask = "block <= block[:, None]" if leads else _mask(student)
    lines += [f"    for i in range({config.layers}):", f'        x = layer(x, angle, {mask}, f"model.layers.{{i}}.")']
    at = "x.flatten(0, 1)[where - 1]" if config.shift else "x.flatten(0, 1)[where]"
    if noise.drafts:
        lines += _draft(student, at)
    if config.kind == "ar":
        return [*lines, "    return head(x)"]
    out = "head(y)"
    if _reads(student):  # without a readout nothing of the noise is read at the output
        out = 'read(y, g, "readout")' if noise.readout else f'read(y, 0 * g, "drafts.{noise.drafts[0]}.readout")'
    return [*lines, f"    y = {at}; return {out}"]


def _signature(student: Base) -> str:
    config, noise = student.config, student.noise
    if config.kind == "ar":
        return "def logits(ids):  # int64 [B, L] -> [B, L, V], the next token's after each"
    masked = f"ids int64 [B, L], {student.vocab_size} where masked" + (" (one block of all rows, their last)" if config.kind == "bd3lm" else "")
    if noise.kind == "none":
        return f"def logits(ids):  # {masked} -> [N, V] of the N masked positions in order"
    if noise.known:
        return f"def logits(ids, g, known, h):  # {masked}; {_NOISE[noise.kind]}: g [N, V] where masked, h [K, V] at flat places known [K] -> [N, V]"
    return f"def logits(ids, g):  # {masked}; g [N, V], {_NOISE[noise.kind]}, of the N masked positions in order -> [N, V]"


def _mask(student: Base) -> str:
    """Who sees whom: None, or bool [.., query, key]."""
    if student.config.kind == "ar":
        return "place <= place[:, None]"
    if student.config.kind == "bd3lm":
        size = student.config.block_size
        return f"place // {size} <= place[:, None] // {size}"
    if student.config.kind == "mtp":  # the masked positions are the row's last
        first = f"(ids == {student.vocab_size}).int().argmax(1)[:, None]" + (" - 1" if student.config.shift else "")
        return f"((place <= place[:, None]) | (place >= {first})[:, :, None])[:, None]"
    return "None"


def _seen(noise: NoiseConfig, g: str, table: str) -> str:
    """softmax(g) on its way into the student."""
    prior = ' + w["input.log_unigram_V"]' if noise.prior == "unigram" else ""
    projection = f"{table}[:V]" if noise.projection == "tied" else 'w["input.projection.weight"].T'
    seen = f"({g}{prior}).softmax(-1) @ {projection}"
    return seen + (' @ w["input.widen.weight"].T' if noise.projection == "low_rank" else "")


def _draft(student: Base, at: str) -> list[str]:
    noisy, restart = student.noise.kind != "none", student.noise.draft_restart
    drafted = 'read(y, g, f"drafts.{i + 1}.readout")' if noisy else "head(y)"
    into = "start" if restart else "x"
    how = "index_copy" if restart else "index_add"
    carry = ' + w[f"drafts.{i + 1}.carry"] * x' if restart else ""
    return [
        f"        if i + 1 in {sorted(student.noise.drafts)}:",
        f'            y = {at}; y = F.linear({drafted}.softmax(-1) @ E[:V], w[f"drafts.{{i + 1}}.embed.weight"])',
        f"            x = {into}.flatten(0, 1).{how}(0, where, y).view_as(x){carry}",
    ]


def _medusa(student: Base) -> list[str]:
    """Place j + 1 after the last known token is the backbone's for j = 0, and head j's after that."""
    noise, medusa = student.noise, student.config.medusa
    noisy, places = noise.kind != "none", medusa.heads_count + 1
    about = "h [B, H]: the backbone's last hidden state after its final norm; out: its output layer; E [V, H]: its embedding"
    about += f"; g [B, {places}, V], {_NOISE[noise.kind]}, of the places that follow" if noisy else ""
    lines = [
        f"{_LOADED}, {student.vocab_size}",
        *([f"def read(y, x, g, name): return y + {_scaled('x')}"] if _reads(student) else []),
        f"def logits(h, out, E{', g' if noisy else ''}):  # {about} -> [B, {places}, V]",
        "    said, drafted = [], {}",
        f"    for j in range({places}):",
        "        x = h",
        f"        for b in range({medusa.blocks} if j else 0):",
        '            y = F.linear(x, w[f"heads.{j - 1}.blocks.{b}.weight"], w[f"heads.{j - 1}.blocks.{b}.bias"])',
    ]
    slots = "range(j + 1)" if noise.input != "none" else f"[k for k in {[place - 1 for place in sorted(noise.drafts)]} if k < j]"
    if noise.input != "none" or noise.drafts:
        empty = ' + w["empty"]' if noise.input == "add" else ""
        parts = [_seen(noise, "g[:, k]", "E") + empty] if noise.input != "none" else []
        parts += ["drafted.get(k, 0)" if parts else "drafted[k]"] if noise.drafts else []
        lines += [
            f"            if b == 0 and len({slots}):",
            f"                z = torch.stack([{' + '.join(parts)} for k in {slots}], 1)",
            f'                z = F.rms_norm(z, h.shape[-1:], w["slot_norm.weight"], {NORM_EPS}).flatten(1)',
            '                y = y + F.linear(z, w[f"heads.{j - 1}.slots.weight"])',
        ]
    lines.append("            x = x + F.silu(y)")
    own = 'F.linear(x, w[f"heads.{j - 1}.lm_head.weight"], w.get(f"heads.{j - 1}.lm_head.bias")) if j else out(x)'
    lines.append(f"        y = {own if medusa.lm_head == 'own' else 'out(x)'}")
    if noise.drafts:
        drafted = 'read(y, x, g[:, j], f"drafts.{j + 1}.readout")' if noisy else "y"
        sharp = '(w[f"drafts.{j + 1}.log_sharpness"].exp() * ' + drafted + ").softmax(-1) @ E"
        lines.append(f"        if j + 1 in {sorted(noise.drafts)}:")
        lines.append(f'            drafted[j] = F.linear({sharp}, w[f"drafts.{{j + 1}}.embed.weight"])')
    said = 'read(y, x, g[:, j], f"heads.{j - 1}.readout") if j else y' if noise.readout else "y"
    return [*lines, f"        said.append({said})", "    return torch.stack(said, 1)"]
