// The core's token movement alone, without torch or Python: selection, movement in both directions, scores and norms against
// sums written out in double precision.
#include "effcore/routing.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "test.h"

using namespace effcore;
using namespace effcore::routing;

namespace {

using test::Dense, test::expect, test::three_threads;

using Floats = Dense<float>;
using Indices = Dense<std::int32_t>;

struct Lists {
  Indices kept, rest;
  Lists(std::int64_t batch, std::int64_t tokens, std::int64_t keep) : kept({batch, keep}), rest({batch, tokens - keep}) {}
};

Lists partition_of(Floats& scores, std::int64_t keep, std::int64_t protect) {
  Lists lists(scores.view.size[0], scores.view.size[1], keep);
  partition({scores.view, keep, protect, lists.kept.data.data(), lists.rest.data.data()}, three_threads);
  return lists;
}

void test_partition(std::int64_t tokens, std::int64_t keep, std::int64_t protect, int levels) {
  const std::string what = "partition " + std::to_string(tokens) + "/" + std::to_string(keep) + ", " + std::to_string(levels) +
                           " levels, protect " + std::to_string(protect);
  std::mt19937 random(7);
  Floats scores({2, tokens});
  for (std::int64_t b = 0; b < 2; ++b)
    for (std::int64_t n = 0; n < tokens; ++n) {
      const int level = static_cast<int>(random() % levels);
      scores.at(b, n) = level == 0   ? std::numeric_limits<float>::quiet_NaN()
                        : level == 1 ? -std::numeric_limits<float>::infinity()
                                     : static_cast<float>(level - 3) * 0.25f;  // 0 and -0.25 among them
    }
  Lists got = partition_of(scores, keep, protect);
  for (std::int64_t b = 0; b < 2; ++b) {
    std::vector<std::int32_t> order(tokens);
    for (std::int32_t n = 0; n < tokens; ++n) order[n] = n;
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t x, std::int32_t y) {
      if ((x < protect) != (y < protect)) return x < protect;
      if (x < protect) return false;
      const float a = scores.at(b, x), c = scores.at(b, y);
      if (std::isnan(a) || std::isnan(c)) return !std::isnan(a) && std::isnan(c);
      return a > c;
    });
    std::sort(order.begin(), order.begin() + keep);
    std::sort(order.begin() + keep, order.end());
    for (std::int64_t i = 0; i < tokens; ++i)
      expect((i < keep ? got.kept.at(b, i) : got.rest.at(b, i - keep)) == order[i], what + ", place " + std::to_string(i));
  }
}

Gather separation(Floats& x, Lists& lists, Floats& a, Floats& b) {
  Gather args{x.view, 2};
  args.list[0] = {a.view, lists.kept.view}, args.list[1] = {b.view, lists.rest.view};
  return args;
}

void test_movement(std::int64_t tokens, std::int64_t keep, std::int64_t channels) {
  const std::string what =
      "movement " + std::to_string(tokens) + "/" + std::to_string(keep) + " of " + std::to_string(channels) + " channels";
  std::mt19937 random(3);
  Floats x({2, tokens, channels}), residual({2, tokens, channels}), scores({2, tokens}), own({2, keep, channels});
  for (Floats* t : {&x, &residual, &scores, &own}) t->randomize(random);
  Lists lists = partition_of(scores, keep, 0);
  Floats a({2, keep, channels}), b({2, tokens - keep, channels}), merged({2, tokens, channels}), sum({2, tokens, channels});
  gather(separation(x, lists, a, b), three_threads);
  bool exact = true;
  for (std::int64_t r = 0; r < 2; ++r)
    for (std::int64_t c = 0; c < channels; ++c) {
      for (std::int64_t i = 0; i < keep; ++i) exact = exact && a.at(r, i, c) == x.at(r, lists.kept.at(r, i), c);
      for (std::int64_t i = 0; i < tokens - keep; ++i) exact = exact && b.at(r, i, c) == x.at(r, lists.rest.at(r, i), c);
    }
  expect(exact, what + ": separated rows");
  Merge args;
  args.list[0] = {a.view, lists.kept.view}, args.list[1] = {b.view, lists.rest.view};
  args.out = merged.view;
  merge(args, three_threads);
  expect(merged.equals(x), what + ": merged rows");
  args.residual = &residual.view, args.first_residual = &own.view, args.out = sum.view;
  merge(args, three_threads);
  Floats expected({2, tokens, channels});
  for (std::int64_t r = 0; r < 2; ++r)
    for (std::int64_t c = 0; c < channels; ++c) {
      for (std::int64_t n = 0; n < tokens; ++n) expected.at(r, n, c) = x.at(r, n, c) + residual.at(r, n, c);
      for (std::int64_t i = 0; i < keep; ++i) expected.at(r, lists.kept.at(r, i), c) += own.at(r, i, c);
    }
  expect(sum.equals(expected), what + ": residuals");  // multiples of 1/32: sums are exact in any order

  Floats dx({2, tokens, channels}), wanted({2, tokens, channels});
  for (std::int64_t r = 0; r < 2 && keep > 1; ++r) lists.kept.at(r, 0) = lists.kept.at(r, keep - 1);  // a repeated token
  scatter({{own.view, lists.kept.view}, dx.view}, three_threads);
  std::fill(wanted.data.begin(), wanted.data.end(), 0.0f);
  for (std::int64_t r = 0; r < 2; ++r)
    for (std::int64_t i = 0; i < keep; ++i)
      for (std::int64_t c = 0; c < channels; ++c) wanted.at(r, lists.kept.at(r, i), c) += own.at(r, i, c);
  expect(dx.equals(wanted), what + ": the gradient of a gather");
}

void test_scores(std::int64_t heads, std::int64_t kv_heads, std::int64_t tokens, std::int64_t dim) {
  const std::string what = "scores of " + std::to_string(heads) + "/" + std::to_string(kv_heads) + " heads";
  std::mt19937 random(5);
  Floats q({2, heads, 1, dim}), k({2, kv_heads, tokens, dim}), scores({2, tokens});
  q.randomize(random), k.randomize(random);
  class_scores({q.view, k.view, 0.1, scores.data.data()}, three_threads);
  for (std::int64_t b = 0; b < 2; ++b) {
    std::vector<double> mean(tokens, 0.0);
    for (std::int64_t h = 0; h < heads; ++h) {
      std::vector<double> p(tokens, 0.0);
      double sum = 0.0;
      for (std::int64_t n = 0; n < tokens; ++n) {
        for (std::int64_t d = 0; d < dim; ++d)
          p[n] += 0.1 * q.data[(b * heads + h) * dim + d] *
                  k.data[((b * kv_heads + h / (heads / kv_heads)) * tokens + n) * dim + d];
        sum += p[n] = std::exp(p[n]);
      }
      for (std::int64_t n = 0; n < tokens; ++n) mean[n] += p[n] / sum / static_cast<double>(heads);
    }
    for (std::int64_t n = 0; n < tokens; ++n)
      expect(std::abs(scores.at(b, n) - mean[n]) <= 1e-5 * mean[n] + 1e-9, what + ", token " + std::to_string(n));
  }
  Floats scratch({2, tokens});
  Lists both(2, tokens, tokens / 2), alone = partition_of(scores, tokens / 2, 1);
  ScorePartition args{{q.view, k.view, 0.1, scratch.data.data()}, {}};
  args.partition = {scratch.view, tokens / 2, 1, both.kept.data.data(), both.rest.data.data()};
  score_partition(args, three_threads);
  expect(both.kept.equals(alone.kept) && both.rest.equals(alone.rest), what + ": scored and partitioned at once");
}

void test_norm(bool rms, std::int64_t channels) {
  const std::string what = std::string(rms ? "rms" : "layer") + " norm of " + std::to_string(channels) + " channels";
  std::mt19937 random(11);
  const std::int64_t tokens = 9, size = 5;
  Floats x({2, tokens, channels}), weight({channels}), bias({channels}), rows({2, size, channels}), normed({2, size, channels}),
      mean({2, size}), rstd({2, size});
  for (Floats* t : {&x, &weight, &bias}) t->randomize(random);
  Indices index({2, size});
  for (std::int64_t i = 0; i < 2 * size; ++i) index.data[i] = static_cast<std::int32_t>(random() % tokens);
  GatherNorm args{x.view, {rows.view, index.view}, normed.view, weight.view};
  if (!rms) args.bias = &bias.view;
  args.eps = 1e-3, args.rms = rms;
  args.mean = rms ? nullptr : mean.data.data(), args.rstd = rstd.data.data();
  gather_norm(args, three_threads);
  for (std::int64_t b = 0; b < 2; ++b)
    for (std::int64_t i = 0; i < size; ++i) {
      double level = 0.0, squares = 0.0;
      for (std::int64_t c = 0; c < channels && !rms; ++c) level += x.at(b, index.at(b, i), c) / static_cast<double>(channels);
      for (std::int64_t c = 0; c < channels; ++c) squares += std::pow(x.at(b, index.at(b, i), c) - level, 2);
      const double scale = 1.0 / std::sqrt(squares / static_cast<double>(channels) + 1e-3);
      bool close = true;
      for (std::int64_t c = 0; c < channels; ++c) {
        const double value = x.at(b, index.at(b, i), c);
        const double exact = (value - level) * scale * weight.data[c] + (rms ? 0.0 : bias.data[c]);
        close = close && rows.at(b, i, c) == value && std::abs(normed.at(b, i, c) - exact) <= 1e-4 * (1.0 + std::abs(exact));
      }
      expect(close, what + ", row " + std::to_string(i));
    }
}

void expect_refusal(const std::string& message, const std::function<void()>& call) {
  try {
    call();
    expect(false, "not refused: " + message);
  } catch (const std::invalid_argument& refusal) {
    expect(std::string(refusal.what()).find(message) != std::string::npos, message + " is not in: " + refusal.what());
  }
}

void test_refusals() {
  Floats scores({2, 4}), x({2, 4, 3});
  expect_refusal("keep must be from 0 to the 4 tokens of a row, got 5", [&] { check_partition("f", scores.view, 5, 0); });
  expect_refusal("keep must be from 0", [&] { check_partition("f", scores.view, -1, 0); });
  expect_refusal("protect must be from 0 to keep (2), got 3", [&] { check_partition("f", scores.view, 2, 3); });
  expect_refusal("scores must have 2 dimensions", [&] { check_partition("f", x.view, 2, 0); });
  Indices a({2, 2}), b({2, 2});
  a.data = {0, 1, 0, 1, 0}, b.data = {2, 3, 2, 4, 0};
  a.view.data = a.data.data(), b.view.data = b.data.data();
  expect_refusal("index_b[1, 1] is 4 but there are 4 tokens", [&] { check_lists("f", a.view, b.view, x.view, 4); });
  b.data[3] = 1;
  expect_refusal("index_b[1, 1] is 1, which index_a or index_b has already",
                 [&] { check_lists("f", a.view, b.view, x.view, 4); });
  b.data[3] = -1;
  expect_refusal("index_b[1, 1] is -1", [&] { check_list("f", "index_b", b.view, x.view, 4); });
}

void run() {
  for (const std::int64_t tokens : {1, 2, 33, 197, 5000})
    for (const int levels : {2, 4, 100})
      for (const std::int64_t keep : {std::int64_t{0}, tokens / 2, tokens})
        test_partition(tokens, keep, std::min<std::int64_t>(keep, 3), levels);
  for (const std::int64_t channels : {1, 5, 64, 385})
    for (const std::int64_t keep : {0, 1, 20, 37}) test_movement(37, keep, channels);
  test_movement(1200, 500, 384);  // large enough for several threads
  test_scores(6, 6, 50, 32), test_scores(6, 2, 17, 33), test_scores(4, 1, 130, 64);
  for (const bool rms : {false, true})
    for (const std::int64_t channels : {1, 7, 64, 384}) test_norm(rms, channels);
  test_refusals();
}

const test::Suite suite(run);

}  // namespace
