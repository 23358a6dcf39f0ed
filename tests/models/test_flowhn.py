"""FlowHN: causality, caches, routes, generation, saving, training."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import effcore
from effcore.methods.flowhn import STRATEGIES, BranchCosts, branch_costs, calibrate
from effcore.models import FlowHNCache, FlowHNConfig, FlowHNForCausalLM
from effcore.models.flowhn_routes import Router


def config(strategy="fac", **fields):
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "state_size": 4,
        "routing_length": 8,
        "attention_tokens": 3,
    }
    return FlowHNConfig(strategy=strategy, **(sizes | fields))


def model(strategy="fac", **fields):
    torch.manual_seed(0)
    made = FlowHNForCausalLM(config(strategy, **fields)).eval()
    with torch.no_grad():
        for p in made.parameters():  # larger than they begin, so that every path is seen in the logits
            if p.dim() == 2 and p.shape != (64, 4):
                p.normal_(std=0.3)
    return made


def ids(batch, tokens, seed=1):
    return torch.randint(0, 50, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_token_sees_a_later_one(strategy):
    net, tokens = model(strategy), ids(1, 20)
    with torch.no_grad():
        before = net(tokens).logits
        for at in range(20):
            changed = tokens.clone()
            changed[0, at] = (changed[0, at] + 7) % 50
            after = net(changed).logits
            assert torch.equal(after[0, :at], before[0, :at]), at
            assert not torch.allclose(after[0, at], before[0, at]), at


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cuts", [(20,), (7, 13), (1,) * 20, (8, 8, 4), (19, 1), (3, 1, 1, 15)])
@pytest.mark.parametrize("max_cache_len", [None, 20], ids=["dynamic", "static"])
def test_prefill_and_steps_equal_one_pass(strategy, cuts, max_cache_len):
    net, tokens = model(strategy), ids(2, 20)
    with torch.no_grad():
        whole = net(tokens, use_cache=False).logits
        cache, parts, at = FlowHNCache(net.config, max_cache_len), [], 0
        for n in cuts:
            parts.append(net(tokens[:, at : at + n], past_key_values=cache).logits)
            at += n
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padded_rows_equal_rows_alone(strategy):
    net, lengths = model(strategy), [5, 12, 1]
    rows = [ids(1, n, seed=n) for n in lengths]
    longest = max(lengths)
    with torch.no_grad():
        for side in ("left", "right"):
            padded, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
            for b, row in enumerate(rows):
                at = slice(longest - lengths[b], None) if side == "left" else slice(0, lengths[b])
                padded[b, at], mask[b, at] = row[0], 1
            for use_cache in (False, True):
                logits = net(padded, attention_mask=mask, use_cache=use_cache).logits
                for b, row in enumerate(rows):
                    alone = net(row, use_cache=False).logits[0]
                    torch.testing.assert_close(logits[b][mask[b].bool()], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cuts", [(1,) * 12, (3, 1, 1, 1, 6), (2, 1, 9)], ids=str)
def test_padded_rows_read_in_parts(strategy, cuts):
    """A part of one token may be padding where a row has not begun."""
    net, lengths, tokens = model(strategy), [5, 12, 8], ids(3, 12)
    mask = torch.stack([torch.arange(12) >= 12 - n for n in lengths]).long()
    with torch.no_grad():
        cache, parts, at = FlowHNCache(net.config), [], 0
        for n in cuts:
            seen = mask[:, : at + n]
            parts.append(net(tokens[:, at : at + n], attention_mask=seen, past_key_values=cache).logits)
            at += n
        for b, n in enumerate(lengths):
            alone = net(tokens[b : b + 1, -n:], use_cache=False).logits[0]
            torch.testing.assert_close(torch.cat(parts, 1)[b, -n:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_at_different_positions_step_together(strategy):
    net, lengths, more = model(strategy), [5, 12, 1], 11
    rows = [ids(1, n + more, seed=n) for n in lengths]
    longest = max(lengths)
    padded, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    for b, n in enumerate(lengths):
        padded[b, longest - n :], mask[b, longest - n :] = rows[b][0, :n], 1
    with torch.no_grad():
        cache = FlowHNCache(net.config)
        net(padded, attention_mask=mask, past_key_values=cache)
        for step, n in ((0, 4), *((s, 1) for s in range(4, more))):  # a chunk, then single tokens
            new = torch.cat([row[:, k + step : k + step + n] for row, k in zip(rows, lengths, strict=True)])
            mask = torch.cat([mask, torch.ones(3, n, dtype=torch.long)], 1)
            logits = net(new, attention_mask=mask, past_key_values=cache).logits
            for b, k in enumerate(lengths):
                alone = net(rows[b][:, : k + step + n], use_cache=False).logits[0, -n:]
                torch.testing.assert_close(logits[b], alone, rtol=1e-4, atol=1e-4)
    assert cache.positions == [n + more for n in lengths] and cache.get_seq_length() == longest + more


def tokens_of(route):
    """What attention takes and what the SSM takes, of a pass of one row."""
    n, total = sum(route.attention.counts), sum(route.attention.counts) + sum(route.ssm.counts)
    order = list(range(total)) if route.order is None else route.order.tolist()
    return order[:n], order[n:]


def test_a_route_does_not_depend_on_the_length_of_the_text():
    router = Router(config(attention_tokens=3))
    for block in range(3):
        long = set(tokens_of(router.uniform(1, 0, 40, torch.device("cpu"))[block])[0])
        for tokens in (1, 7, 8, 9, 39):
            attention, ssm = tokens_of(router.uniform(1, 0, tokens, torch.device("cpu"))[block])
            assert set(attention) == {t for t in long if t < tokens}
            assert attention == sorted(attention) and ssm == sorted(ssm)
            assert sorted(attention + ssm) == list(range(tokens))


def test_routes_of_many_lengths_take_little_memory():
    router = Router(config(routing_length=1024, attention_tokens=300))
    for tokens in range(1, 600):
        router.uniform(64, 0, tokens, torch.device("cpu"))
    kept = {
        id(t): t for routes in router._uniform.values() for r in routes for t in (r.order, r.inverse) if t is not None
    }
    assert sum(t.numel() for t in kept.values()) <= 2 * 3 * (1 << 20)  # order and inverse in three blocks
    assert router.uniform(64, 0, 599, torch.device("cpu")) is router.uniform(64, 0, 599, torch.device("cpu"))


def test_the_papers_example_of_circulation():
    # six tokens, two to attention: the last two first, then the window moves back by its own length
    routes = Router(config(routing_length=6, attention_tokens=2)).uniform(1, 0, 6, torch.device("cpu"))
    assert [tokens_of(r)[0] for r in routes] == [[4, 5], [2, 3], [0, 1]]


def test_the_rows_of_a_batch_stand_side_by_side():
    for route in Router(config(routing_length=6, attention_tokens=2)).uniform(2, 0, 6, torch.device("cpu")):
        attention, ssm = route.order[:4].view(2, 2), route.order[4:].view(2, 4)
        assert (attention[1] == attention[0] + 6).all() and (ssm[1] == ssm[0] + 6).all()
        assert route.order[route.inverse.long()].tolist() == list(range(12))


@pytest.mark.parametrize("tokens", [0, 8])
def test_all_tokens_to_one_branch(tokens):
    net, text = model(attention_tokens=tokens), ids(2, 13)
    with torch.no_grad():
        whole = net(text, use_cache=False).logits
        cache = FlowHNCache(net.config)
        parts = [net(text[:, :6], past_key_values=cache).logits, net(text[:, 6:], past_key_values=cache).logits]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_static_cache_stays_where_it_is_and_says_when_it_is_full(strategy):
    net, tokens = model(strategy), ids(2, 20)

    def places():
        return [t.data_ptr() for s in cache.stores for t in (s.keys, s.values, s.state, s.convolution) if t is not None]

    with torch.no_grad():
        cache = FlowHNCache(net.config, 20)
        net(tokens[:, :12], past_key_values=cache)
        before, size = places(), cache.bytes()
        net(tokens[:, 12:15], past_key_values=cache)
        for i in range(15, 20):
            net(tokens[:, i : i + 1], past_key_values=cache)
        assert places() == before and cache.bytes() == size
        with pytest.raises(ValueError, match="holds 20 tokens of a row, got 21"):
            net(tokens[:, :1], past_key_values=cache)


def test_a_copied_cache_goes_on_by_itself():
    """A prompt that is read once and continued several times; of the model, which captured steps refer to, there is no copy."""
    net, tokens = model(), ids(2, 12)
    with torch.no_grad():
        cache = FlowHNCache(config(), 20)
        net(tokens[:, :8], past_key_values=cache)
        cache.graphs._model = net
        other = copy.deepcopy(cache)
        first = net(tokens[:, 8:], past_key_values=cache).logits
        torch.testing.assert_close(net(tokens[:, 8:], past_key_values=other).logits, first)
    assert other.graphs._model is None and cache.graphs._model is net


def test_a_static_cache_takes_fewer_rows():
    net, tokens = model(), ids(2, 12)
    with torch.no_grad():
        whole = net(tokens[1:], use_cache=False).logits[:, 9:]
        cache = FlowHNCache(net.config, 20)
        net(tokens[:, :9], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1]))
        after = net(tokens[1:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(after, whole, rtol=1e-4, atol=1e-4)


def test_a_static_cache_has_no_gradients():
    net, cache = model(), FlowHNCache(config(), 20)
    with pytest.raises(RuntimeError, match="static cache is not differentiable"):
        net(ids(2, 7), past_key_values=cache)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("padding", [0, 3])
def test_a_cache_changes_no_gradient(strategy, padding):
    net, tokens = model(strategy).double(), ids(2, 11)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    found = []
    for use_cache in (False, True):
        net.zero_grad()
        (net(tokens, attention_mask=mask, use_cache=use_cache).logits.square() * mask[..., None]).sum().backward()
        found.append({name: p.grad.clone() for name, p in net.named_parameters()})
    torch.testing.assert_close(found[0], found[1])
    net.get_input_embeddings().requires_grad_(False)
    prompt = net(tokens[:, :6], attention_mask=mask[:, :6], use_cache=True)
    with pytest.raises(RuntimeError, match="continuing from a cache is not differentiable"):
        net(tokens[:, 6:], attention_mask=mask, past_key_values=prompt.past_key_values)


def test_compiled_steps_behind_a_static_cache():
    net, tokens = model(), ids(2, 30)
    with torch.no_grad():
        whole = net(tokens, use_cache=False).logits[:, 12:]
        cache = FlowHNCache(net.config, 30)
        net(tokens[:, :12], past_key_values=cache)
        torch._dynamo.reset()
        for layer in net.model.layers:
            layer.compile(dynamic=False, backend="eager")
        with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
            steps = [net(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(12, 30)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_the_ssm_takes_constant_memory():
    net, cache = model(attention_tokens=0), FlowHNCache(config())
    with torch.no_grad():
        net(ids(1, 3), past_key_values=cache)
        size = cache.bytes()
        for _ in range(30):
            net(ids(1, 1), past_key_values=cache)
    assert cache.bytes() == size > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"cache_implementation": "static", "num_beams": 3}],
    ids=["greedy", "beams", "static", "static beams"],
)
def test_generate_with_and_without_cache(strategy, options):
    net = model(strategy)
    prompt, mask = ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    outs = [
        net.generate(prompt, attention_mask=mask, max_new_tokens=9, do_sample=False, use_cache=c, pad_token_id=0, **o)
        for c, o in ((True, options), (False, {k: v for k, v in options.items() if k == "num_beams"}))
    ]
    assert torch.equal(*outs)


def test_save_and_load(tmp_path):
    net, text = model(), ids(1, 10)
    net.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, FlowHNForCausalLM) and loaded.config.attention_tokens == 3
    with torch.no_grad():
        assert torch.equal(loaded(text).logits, net(text).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter(checkpointing):
    text = ids(2, 16)
    gradients = []
    for on in (False, checkpointing):
        net = model().train()
        if on:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        net(text, labels=text).loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in net.parameters())
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_trainer_and_autocast(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in ids(1, 16).expand(8, -1)]
    net = model()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=4, learning_rate=3e-3, report_to=[], bf16=True,
        use_cpu=True, save_strategy="no", logging_steps=5, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(net, arguments, train_dataset=data)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] / 2


def test_bfloat16_model_is_close():
    net, text = model(), ids(2, 20)
    with torch.no_grad():
        exact = net(text).logits
        rounded = net.bfloat16()(text).logits
    assert (rounded.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_bad_arguments_are_named():
    net = model()
    for call, message in (
        (lambda: config(attention_tokens=9), "attention_tokens must be from 0 to routing_length"),
        (lambda: config("halves"), "strategy must be one of none, ae, fa, fac, sequential"),
        (lambda: config(num_key_value_heads=0), "num_key_value_heads must be positive, got 0"),
        (lambda: config(state_size=0), "state_size must be positive, got 0"),
        (lambda: FlowHNConfig.of_size("2B"), "size must be one of 135M"),
        (lambda: net(ids(1, 4), attention_mask=torch.tensor([[1, 0, 1, 1]])), "attention_mask has a hole"),
        (lambda: net(ids(1, 4), attention_mask=torch.ones(1, 5)), r"attention_mask must be \[1, 4\]"),
        (lambda: net(), "give input_ids or inputs_embeds"),
        (
            lambda: net(ids(1, 4), past_key_values=FlowHNCache(config(num_hidden_layers=2))),
            "for 2 blocks, the model has 3",
        ),
        (lambda: net(ids(3, 1), past_key_values=net(ids(2, 4)).past_key_values), "the cache holds 2 rows, got 3"),
    ):
        with pytest.raises(Exception, match=message):
            call()
    for value in (True, 0, torch.zeros(1), ids(1, 4)):
        with pytest.raises(TypeError, match="unexpected arguments"):
            net(ids(1, 4), output_attentions=value)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tokens", [0, 1])
def test_short_texts(strategy, tokens):
    net, text = model(strategy), ids(2, 1 + tokens)
    assert net(text[:, :tokens]).logits.shape == (2, tokens, 50)
    with torch.no_grad():  # behind nothing, and with nothing behind
        cache = FlowHNCache(net.config)
        parts = [
            net(text[:, i:j], past_key_values=cache).logits for i, j in ((0, tokens), (tokens, 1 + tokens), (0, 0))
        ]
        torch.testing.assert_close(torch.cat(parts, 1), net(text).logits, rtol=1e-4, atol=1e-4)
    net.train()(text[:, :tokens]).logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("size, parameters", [("135M", 135e6), ("350M", 350e6), ("1B", 1e9)])
def test_sizes(size, parameters):
    with torch.device("meta"):
        net = effcore.FlowHNForCausalLM(effcore.FlowHNConfig.of_size(size))
    assert abs(net.num_parameters() / parameters - 1) < 0.06


def test_the_split_balances_both_branches():
    for size in ("135M", "350M", "1B"):
        made = FlowHNConfig.of_size(size)
        costs, n = branch_costs(made), made.split
        assert n % 16 == 0
        assert abs(costs.attention(n) / (costs.ssm * (made.routing_length - n)) - 1) < 0.05


def test_calibration_finds_the_costs():
    truth = BranchCosts(2.0, 0.01, 3.0)
    found = calibrate(truth.attention, lambda n: 3.0 * n, 1024)
    assert abs(found.linear - 2) < 1e-6 and abs(found.quadratic - 0.01) < 1e-9 and found.ssm == 3.0
