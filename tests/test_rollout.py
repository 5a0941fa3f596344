import gc
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rlvr_lightning.rollout import HFEngine, stop_token_ids
from rlvr_lightning.rollout import hf as hf_module
from rlvr_lightning.rollout.sampling import GOLDEN, inverse_cdf, sample, signed, stream_keys, top_k, top_p, uniforms
from rlvr_lightning.schema import Sampling

VOCAB = 97
STOP = [0, 11, 12, 13, 14]
PAD = 0
PROMPTS = [[5, 6, 7], [1], [9, 8] * 35 + [3], [4, 5, 6, 7, 8], [2] * 11]
SEEDS = [3, 1, -5, 2**70, 4]


def build(kind, heads=6, kv_heads=2):
    torch.manual_seed(0)
    common = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    common |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 256}
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=10, tie_word_embeddings=True, **common))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common))
    else:
        ends = {"bos_token_id": None, "eos_token_id": None}
        config = GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=heads, n_positions=256, **ends)
        model = GPT2LMHeadModel(config)
    return sharpen(model)


def sharpen(model):
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(6)  # random weights are too small for distributions worth sampling from
    return model.eval()


@pytest.fixture(scope="module", params=["qwen3", "llama-no-gqa", "gpt2"])
def model(request):
    return build(request.param.split("-")[0], kv_heads=6 if "no-gqa" in request.param else 2)


@pytest.fixture(scope="module")
def qwen():
    return build("qwen3")


def engine(model, max_batch=64, stop=STOP):
    return HFEngine(model, stop, PAD, max_batch=max_batch)


def full_logits(model, rollouts, r):
    """Logits [T, V] of each token of a completion, by a plain forward pass over prompt and completion."""
    prompt = rollouts.prompt_ids[r // rollouts.group]
    completion = rollouts.completion_ids[r, : rollouts.lengths[r]]
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor(prompt), completion])[None]).logits[0]
    return logits[len(prompt) - 1 : -1].float(), completion


def same(a, b):
    assert torch.equal(a.completion_ids, b.completion_ids)
    assert torch.equal(a.completion_mask, b.completion_mask)
    assert torch.equal(a.truncated, b.truncated)
    assert (a.rollout_logprobs - b.rollout_logprobs).abs().max() < 1e-4


def test_greedy_equals_generate(model):
    sampling = Sampling(max_tokens=23, temperature=0)
    rollouts = engine(model, 3).generate(PROMPTS, 2, sampling, SEEDS)
    for r in range(len(PROMPTS) * 2):
        prompt = torch.tensor([PROMPTS[r // 2]])
        settings = {"max_new_tokens": 23, "do_sample": False, "eos_token_id": STOP, "pad_token_id": PAD}
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0, prompt.shape[1] :]
        assert rollouts.completion_ids[r, : rollouts.lengths[r]].tolist() == expected.tolist()


@pytest.mark.parametrize(
    "sampling", [Sampling(max_tokens=37), Sampling(max_tokens=9, temperature=0.6, top_k=7, top_p=0.9)]
)
def test_no_batching_changes_a_sampled_token(model, sampling):
    """Sharing prompts, leaving early, joining late, splitting groups: all the same completions."""
    together = engine(model, 64).generate(PROMPTS, 5, sampling, SEEDS)
    assert len(set(together.lengths.tolist())) > 3, "sequences should leave at different times"
    for max_batch in (1, 3, 7):
        same(engine(model, max_batch).generate(PROMPTS, 5, sampling, SEEDS), together)
    for p, prompt in enumerate(PROMPTS):
        alone = engine(model, 4).generate([prompt], 5, sampling, [SEEDS[p]])
        rows = slice(5 * p, 5 * p + 5)
        width = alone.completion_ids.shape[1]
        assert torch.equal(alone.completion_ids, together.completion_ids[rows, :width])
        assert together.lengths[rows].tolist() == alone.lengths.tolist()
    fewer = engine(model).generate(PROMPTS, 3, sampling, SEEDS)
    assert torch.equal(fewer.select([1]).lengths, together.select([1]).lengths[:3])
    backwards = engine(model).generate(PROMPTS[::-1], 5, sampling, SEEDS[::-1])
    same(backwards.select([4, 3, 2, 1, 0]), together)


def test_seeds_and_group_members_differ(qwen):
    sampling = Sampling(max_tokens=8)
    rollouts = engine(qwen).generate([PROMPTS[0]] * 3, 4, sampling, [0, 1, 0])
    rows = [tuple(row) for row in rollouts.completion_ids.tolist()]
    assert rows[:4] == rows[8:]
    assert len(set(rows[:8])) == 8


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_equal_the_full_forward(model, temperature):
    rollouts = engine(model, 7).generate(PROMPTS, 3, Sampling(max_tokens=41, temperature=temperature), SEEDS)
    for r in range(15):
        logits, completion = full_logits(model, rollouts, r)
        expected = (logits / (temperature or 1.0)).log_softmax(-1).gather(1, completion[:, None])[:, 0]
        assert (rollouts.rollout_logprobs[r, : len(completion)] - expected).abs().max() < 1e-4
    assert (rollouts.rollout_logprobs[~rollouts.completion_mask] == 0).all()
    assert (rollouts.completion_ids[~rollouts.completion_mask] == PAD).all()


def naive_distribution(logits, sampling):
    """Probabilities by scalar loops: temperature, then top-k, then top-p, then renormalised."""
    largest = max(logits)
    weights = [math.exp((z - largest) / sampling.temperature) for z in logits]
    total = sum(weights)
    probs = [w / total for w in weights]
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    if sampling.top_k:
        order = order[: sampling.top_k]
    mass = sum(probs[i] for i in order)
    kept, reached = [], 0.0
    for i in order:
        kept.append(i)
        reached += probs[i] / mass
        if reached >= sampling.top_p:
            break
    mass = sum(probs[i] for i in kept)
    return [probs[i] / mass if i in kept else 0.0 for i in range(len(probs))]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=13, top_k=5),
        Sampling(max_tokens=13, top_p=0.8),
        Sampling(max_tokens=13, temperature=1.7, top_k=9, top_p=0.55),
        Sampling(max_tokens=13, temperature=0.5, top_k=1),
        Sampling(max_tokens=13, temperature=0.5, top_k=VOCAB + 3),
    ],
)
def test_rollout_logprobs_are_those_of_the_filtered_distribution(qwen, sampling):
    rollouts = engine(qwen).generate(PROMPTS[:3], 3, sampling, SEEDS[:3])
    for r in range(9):
        logits, completion = full_logits(qwen, rollouts, r)
        for t, token in enumerate(completion.tolist()):
            prob = naive_distribution(logits[t].tolist(), sampling)[token]
            assert prob > 0
            assert rollouts.rollout_logprobs[r, t].item() == pytest.approx(math.log(prob), abs=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=2.0), Sampling(top_k=4), Sampling(top_p=0.7)])
def test_draws_follow_the_distribution(sampling):
    """Chi-square over 7 tokens, 30,000 draws; one token has probability 0."""
    logits = torch.tensor([1.0, -0.5, 0.0, -torch.inf, 2.0, 0.3, -2.0])
    draws = 30_000
    uniform = uniforms(stream_keys([42], 3).repeat(draws // 3), torch.arange(draws // 3).repeat_interleave(3))
    tokens, logprobs = sample(logits.expand(draws, 7), uniform, sampling)
    expected = naive_distribution(logits.tolist(), sampling)
    counts = torch.bincount(tokens, minlength=7).tolist()
    assert all(n == 0 for n, p in zip(counts, expected, strict=True) if p == 0)
    terms = [(n - p * draws) ** 2 / (p * draws) for n, p in zip(counts, expected, strict=True) if p > 0]
    assert sum(terms) < 27.9  # 99.99 % of chi-square with 6 degrees of freedom
    for token in set(tokens.tolist()):
        assert logprobs[tokens == token][0].item() == pytest.approx(math.log(expected[token]), abs=1e-5)


def test_inverse_cdf_at_its_edges():
    """A token of probability 0 is drawn neither at 0 nor just below 1; rare ones in a large vocabulary are."""
    probs = torch.zeros(3, 1003)
    probs[:, 5], probs[:, 700], probs[:, 901] = 0.5, 0.25, 1e-12
    last = 1 - 2**-53
    assert inverse_cdf(probs, torch.tensor([0.0, 0.9, last], dtype=torch.float64))[0].tolist() == [5, 700, 901]
    many = torch.rand(7, 3001, generator=torch.Generator().manual_seed(0)) ** 30
    many[many < 1e-3] = 0
    for u in (0.0, 1e-300, 0.3, 0.999999999, last):
        tokens, total = inverse_cdf(many, torch.full((7,), u, dtype=torch.float64))
        assert (many.gather(1, tokens[:, None]) > 0).all()
        for row, token in zip(many.tolist(), tokens.tolist(), strict=True):
            assert math.fsum(row[:token]) <= u * math.fsum(row) * (1 + 1e-6)
            assert math.fsum(row[: token + 1]) >= u * math.fsum(row) * (1 - 1e-6)
        assert total.tolist() == pytest.approx([math.fsum(row) for row in many.tolist()], rel=1e-6)


def test_filters_count_equal_entries_once():
    uniform = torch.full((1, 5), 0.2)
    assert top_k(uniform, 3).tolist() == [pytest.approx([0.2, 0.2, 0.2, 0, 0])]
    assert top_p(uniform, 0.5).tolist() == [pytest.approx([0.2, 0.2, 0.2, 0, 0])]


def test_top_p_beyond_the_entries_sorted_first():
    """2,500 nearly equal tokens: the 1,024 largest do not reach 90 %."""
    probs = 1 + torch.rand(2, 2500, generator=torch.Generator().manual_seed(0)) / 100
    kept = top_p(probs / probs.sum(-1, keepdim=True), 0.9)
    for row in kept:
        share = sorted(row[row > 0].tolist())
        assert sum(share) >= 0.9 - 1e-6 > sum(share[1:]) - 1e-4
        assert 2200 < len(share) < 2260


def naive_splitmix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_uniforms_against_whole_numbers():
    seeds, group = [7, -1, 2**64 + 7, 8], 3
    keys = stream_keys(seeds, group)
    expected = [
        naive_splitmix64((naive_splitmix64((s + GOLDEN) % 2**64) + (g + 1) * GOLDEN) % 2**64)
        for s in seeds
        for g in range(group)
    ]
    assert keys.tolist() == [signed(k) for k in expected]
    assert keys[:3].tolist() == keys[6:9].tolist()  # the same low 64 bits
    numbers = uniforms(keys[:1].expand(5), torch.arange(5)).tolist()
    assert numbers == [(naive_splitmix64((expected[0] + (t + 1) * GOLDEN) % 2**64) >> 11) / 2**53 for t in range(5)]


def test_truncated_means_no_stop_token(qwen):
    rollouts = engine(qwen, 5).generate(PROMPTS, 4, Sampling(max_tokens=17), SEEDS)
    assert 0 < rollouts.truncated.sum() < 20
    for r in range(20):
        completion = rollouts.completion_ids[r, : rollouts.lengths[r]].tolist()
        assert not set(completion[:-1]) & set(STOP)
        assert rollouts.truncated[r].item() == (completion[-1] not in STOP)
        assert len(completion) == 17 or completion[-1] in STOP
    one = engine(qwen).generate(PROMPTS, 4, Sampling(max_tokens=1), SEEDS)
    assert one.completion_ids.shape == (20, 1)
    assert torch.equal(one.completion_ids[:, 0], rollouts.completion_ids[:, 0])
    everything = engine(qwen, stop=range(VOCAB)).generate(PROMPTS, 4, Sampling(max_tokens=5), SEEDS)
    assert everything.lengths.tolist() == [1] * 20
    assert not everything.truncated.any()


@pytest.mark.parametrize("max_batch", [1, 3, 8, 64])
def test_each_token_is_computed_once(qwen, max_batch, monkeypatch):
    """Through the model go each prompt's tokens once, and each sampled token but a completion's last once."""
    monkeypatch.setattr(hf_module, "PROMPT_TOKENS", 20)
    seen = []
    hook = qwen.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    try:
        rollouts = engine(qwen, max_batch).generate(PROMPTS, 5, Sampling(max_tokens=29), SEEDS)
    finally:
        hook.remove()
    expected = sum(map(len, PROMPTS)) + int((rollouts.lengths - 1).sum())
    assert sum(rows * tokens for rows, tokens in seen) == expected
    decoding = [rows for rows, tokens in seen if tokens == 1]
    assert max(decoding) <= max_batch
    same(rollouts, engine(qwen).generate(PROMPTS, 5, Sampling(max_tokens=29), SEEDS))


def test_current_weights_are_used_and_modes_come_back(qwen):
    model = build("llama")
    sampling = Sampling(max_tokens=5, temperature=0)
    held = engine(model)
    model.train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    implementation = model.config._attn_implementation
    before = held.generate(PROMPTS, 1, sampling, SEEDS)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    after = held.generate(PROMPTS, 1, sampling, SEEDS)
    assert after.completion_ids[:, 0].tolist() == [VOCAB - 1 - t for t in before.completion_ids[:, 0].tolist()]
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        held.generate(PROMPTS, 1, Sampling(max_tokens=5), SEEDS)
    assert [m.training for m in model.modules()] == modes
    assert model.config._attn_implementation == implementation
    assert torch.is_grad_enabled()
    assert not any(isinstance(x, torch.Tensor) for x in vars(held).values())


KINDS = (torch.Tensor, torch.nn.Parameter)  # another test's may be fake, and have no memory


def test_nothing_is_held_between_calls(qwen):
    def storages():
        gc.collect()
        return {x.untyped_storage().data_ptr() for x in gc.get_objects() if type(x) in KINDS}

    held = engine(qwen, 3)
    held.generate(PROMPTS, 2, Sampling(max_tokens=3), SEEDS)
    before = storages()
    rollouts = held.generate(PROMPTS, 4, Sampling(max_tokens=9), SEEDS)
    returned = {x.untyped_storage().data_ptr() for x in vars(rollouts).values() if isinstance(x, torch.Tensor)}
    assert storages() - before <= returned


def test_adapters_apply():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    base = build("qwen3")
    plain = engine(base).generate(PROMPTS, 2, Sampling(max_tokens=7), SEEDS)
    model = peft.get_peft_model(base, config)
    rollouts = engine(model).generate(PROMPTS, 2, Sampling(max_tokens=7), SEEDS)
    assert not torch.equal(plain.completion_ids[:, 0], rollouts.completion_ids[:, 0])
    model.eval()
    for r in range(10):
        logits, completion = full_logits(model, rollouts, r)
        expected = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        assert (rollouts.rollout_logprobs[r, : len(completion)] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    model = build("qwen3") if autocast else build("qwen3").to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rollouts = engine(model, 3).generate(PROMPTS, 2, Sampling(max_tokens=7), SEEDS)
        assert rollouts.rollout_logprobs.dtype == torch.float32
        for r in range(10):
            logits, completion = full_logits(model, rollouts, r)
            expected = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
            assert (rollouts.rollout_logprobs[r, : len(completion)] - expected).abs().mean() < 0.05


BAD_CALLS = [
    ({"prompts": []}, "seeds: one for each prompt"),
    ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
    ({"prompts": [[1], [VOCAB]]}, r"prompts\[1\] has a token outside"),
    ({"prompts": [[1], [-1]]}, r"prompts\[1\] has a token outside"),
    ({"seeds": [1]}, "seeds: one for each"),
    ({"group": 0}, "group must be at least 1"),
    ({"sampling": Sampling(max_tokens=255)}, "sampling.max_tokens: 255 .* max_position_embeddings = 256"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CALLS)
def test_bad_calls_get_one_line(qwen, change, message):
    arguments = {"prompts": [[1], [2, 3]], "group": 2, "sampling": Sampling(max_tokens=3), "seeds": [1, 2]} | change
    with pytest.raises(ValueError, match=message) as caught:
        engine(qwen).generate(**arguments)
    assert "\n" not in str(caught.value)


def test_bad_construction_gets_one_line(qwen):
    with pytest.raises(ValueError, match="max_batch must be at least 1"):
        HFEngine(qwen, STOP, PAD, max_batch=0)
    with pytest.raises(ValueError, match="must lie below 97, got 97"):
        HFEngine(qwen, [97], PAD)
    with pytest.raises(ValueError, match="the attention of Linear cannot be replaced"):
        HFEngine(torch.nn.Linear(2, 2), STOP, PAD)


def test_sliding_window():
    """Prompts and completions on both sides of a window of 16 tokens; the model's own mask is the reference."""
    shape = build("qwen3").config.to_dict() | {"use_sliding_window": True, "sliding_window": 16}
    shape["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    model = sharpen(Qwen3ForCausalLM(Qwen3Config(**shape)))
    rollouts = engine(model, 4, stop=[3, 4]).generate(PROMPTS, 2, Sampling(max_tokens=43), SEEDS)
    assert rollouts.lengths.max() > 16 > rollouts.lengths.min()
    for r in range(10):
        logits, completion = full_logits(model, rollouts, r)
        expected = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        assert (rollouts.rollout_logprobs[r, : len(completion)] - expected).abs().max() < 1e-4


def test_other_kinds_of_attention_are_refused():
    config = build("qwen3").config
    config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match="layers of type 'chunked_attention'"):
        engine(Qwen3ForCausalLM(config))


def test_stop_token_ids():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "a", "\n", "b\n\n", "c", ".\n", "ab"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<end>"))
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    assert stop_token_ids(tokenizer, []) == [0]
    assert stop_token_ids(tokenizer, ["\n"]) == [0, 2, 3, 5]
    assert stop_token_ids(tokenizer, ["\n\n", "c"]) == [0, 3, 4]
    with pytest.raises(ValueError, match="stop: no single token contains 'xyz'"):
        stop_token_ids(tokenizer, ["xyz"])
    with pytest.raises(ValueError, match="stop"):
        stop_token_ids(tokenizer, [""])
