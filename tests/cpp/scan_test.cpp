// The core's convolution and selective scan alone, without torch or Python: outputs, states and gradients against sums written
// out in double precision.
#include "effcore/scan.h"

#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "test.h"

using namespace effcore;
using namespace effcore::scan;

namespace {

using test::Dense, test::expect, test::three_threads;
using Sums = std::vector<double>;

using Floats = Dense<float>;

struct Normal : Floats {
  Normal(const std::vector<std::int64_t>& sizes, std::mt19937& random, float mean = 0.0f) : Floats(sizes) {
    std::normal_distribution<float> draw(mean);
    for (float& x : data) x = draw(random);
  }
};

void expect_close(const Floats& got, const Sums& exact, const std::string& what) {
  double scale = 0.0, worst = 0.0;
  for (const double x : exact) scale = std::max(scale, std::abs(x));
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double error = std::abs(got[i] - exact[i]);
    worst = error <= worst ? worst : error;  // NaN stays
  }
  expect(worst <= 2e-5 * scale, what + ": off by " + std::to_string(worst) + " of " + std::to_string(scale));
}

// (row, begin, end) of each sequence
struct Sequence {
  std::int64_t row, begin, end;
};
std::vector<Sequence> sequences_of(std::int64_t batch, std::int64_t tokens, const std::vector<std::int32_t>& cuts) {
  std::vector<Sequence> all;
  for (std::size_t s = 1; s < cuts.size(); ++s) all.push_back({0, cuts[s - 1], cuts[s]});
  for (std::int64_t b = 0; cuts.empty() && b < batch; ++b) all.push_back({b, 0, tokens});
  return all;
}

struct Shape {
  std::int64_t batch, tokens, channels, states;
  std::vector<std::int32_t> cuts;
};

void test_scan(const Shape& shape, std::int64_t keep) {
  const auto& [batch, tokens, channels, states, cuts] = shape;
  const std::string what = "scan " + std::to_string(batch) + "x" + std::to_string(tokens) + "x" + std::to_string(channels) +
                           "x" + std::to_string(states) + ", keep " + std::to_string(keep) + ": ";
  std::mt19937 random(3);
  const auto all = sequences_of(batch, tokens, cuts);
  const auto count = static_cast<std::int64_t>(all.size());
  const std::vector<std::int64_t> wide{batch, tokens, channels}, narrow{batch, tokens, states}, state{count, channels, states};
  const Normal x(wide, random), dt(wide, random), z(wide, random), dout(wide, random), B(narrow, random), C(narrow, random);
  Normal A({channels, states}, random);
  const Normal D({channels}, random), bias({channels}, random, -1.0f), initial(state, random), dfinal(state, random);
  for (float& a : A.data) a = -std::abs(a);
  Dense<std::int32_t> offsets({count + 1});
  for (std::size_t i = 0; i < cuts.size(); ++i) offsets.data[i] = cuts[i];
  Floats out(wide), final_state(state), dx(wide), ddt(wide), dz(wide), dB(narrow), dC(narrow), dinitial(state);
  Floats dA({channels, states}), dD({channels}), dbias({channels});

  Scan args{x.view, dt.view, A.view, B.view, C.view, &D.view, &z.view, &bias.view, &initial.view};
  args.offsets = cuts.empty() ? nullptr : &offsets.view;
  args.softplus = true;
  check_scan("scan_test", args);
  Floats kept({kept_states(x.view, args.offsets, keep), states, channels});
  args.out = out.view, args.final_state = final_state.data.data();
  args.states = kept.data.data(), args.keep = keep;
  selective_scan(args, three_threads);
  ScanBackward back{args, dout.view, dfinal.data.data(), dx.view, ddt.view, dB.view, dC.view, &dz.view};
  back.dA = dA.data.data(), back.dD = dD.data.data(), back.ddt_bias = dbias.data.data(), back.dinitial = dinitial.data.data();
  selective_scan_backward(back, three_threads);

  Sums y(batch * tokens * channels), gx(y), gdt(y), gz(y), gB(batch * tokens * states), gC(gB);
  Sums gA(channels * states), gD(channels), gbias(channels), last(count * channels * states), first(last);
  for (std::int64_t s = 0; s < count; ++s)
    for (std::int64_t e = 0; e < channels; ++e) {
      const auto [row, begin, end] = all[s];
      std::vector<Sums> h{Sums(states)};
      Sums dh(states);
      for (std::int64_t n = 0; n < states; ++n)
        h[0][n] = initial[(s * channels + e) * states + n], dh[n] = dfinal[(s * channels + e) * states + n];
      const auto step = [&](std::int64_t i) { return std::log1p(std::exp(dt[i] + bias[e])); };
      const auto open = [&](std::int64_t i) { return 1.0 / (1.0 + std::exp(-z[i])); };
      Sums ungated;
      for (std::int64_t t = begin; t < end; ++t) {
        const std::int64_t i = (row * tokens + t) * channels + e, j = (row * tokens + t) * states;
        Sums next(states);
        double sum = D[e] * x[i];
        for (std::int64_t n = 0; n < states; ++n) {
          next[n] = std::exp(step(i) * A[e * states + n]) * h.back()[n] + step(i) * x[i] * B[j + n];
          sum += next[n] * C[j + n];
        }
        h.push_back(next), ungated.push_back(sum);
        y[i] = sum * z[i] * open(i);
      }
      for (std::int64_t t = end - 1; t >= begin; --t) {
        const std::int64_t i = (row * tokens + t) * channels + e, j = (row * tokens + t) * states;
        const double g = dout[i] * z[i] * open(i);
        gz[i] = dout[i] * ungated[t - begin] * open(i) * (1.0 + z[i] * (1.0 - open(i)));
        double through = 0.0, along = 0.0;
        for (std::int64_t n = 0; n < states; ++n) {
          const double decay = std::exp(step(i) * A[e * states + n]), grad = dh[n] + g * C[j + n];
          const double q = grad * decay * h[t - begin][n];
          gB[j + n] += grad * step(i) * x[i], gC[j + n] += g * h[t - begin + 1][n];
          through += grad * B[j + n], along += q * A[e * states + n];
          gA[e * states + n] += step(i) * q;
          dh[n] = decay * grad;
        }
        gx[i] = through * step(i) + g * D[e];
        gdt[i] = (through * x[i] + along) / (1.0 + std::exp(-(dt[i] + bias[e])));
        gD[e] += g * x[i], gbias[e] += gdt[i];
      }
      for (std::int64_t n = 0; n < states; ++n)
        last[(s * channels + e) * states + n] = h.back()[n], first[(s * channels + e) * states + n] = dh[n];
    }
  expect_close(out, y, what + "out"), expect_close(final_state, last, what + "final state");
  expect_close(dx, gx, what + "dx"), expect_close(ddt, gdt, what + "ddt"), expect_close(dz, gz, what + "dz");
  expect_close(dB, gB, what + "dB"), expect_close(dC, gC, what + "dC"), expect_close(dA, gA, what + "dA");
  expect_close(dD, gD, what + "dD"), expect_close(dbias, gbias, what + "ddt_bias");
  expect_close(dinitial, first, what + "dinitial");
}

// A step a token gives what the scan gives.
void test_steps(std::int64_t channels, std::int64_t states) {
  const std::string what = "steps of " + std::to_string(channels) + "x" + std::to_string(states);
  constexpr std::int64_t batch = 2, tokens = 5;
  std::mt19937 random(5);
  const Normal x({batch, tokens, channels}, random), dt({batch, tokens, channels}, random),
      initial({batch, channels, states}, random);
  const Normal A({channels, states}, random, -2.0f), B({batch, tokens, states}, random), C({batch, tokens, states}, random);
  Floats out({batch, tokens, channels}), last({batch, channels, states});
  Scan scan{x.view, dt.view, A.view, B.view, C.view};
  scan.initial_state = &initial.view, scan.softplus = true, scan.out = out.view, scan.final_state = last.data.data();
  selective_scan(scan, three_threads);
  std::vector<float> state = initial.data;
  Sums y(batch * tokens * channels);
  const auto token = [](const Floats& rows, std::int64_t t) {  // [B, L, E] -> [B, E]
    TensorView one = rows.view;
    one.data = const_cast<float*>(rows.data.data()) + t * rows.view.stride[1];
    one.rank = 2, one.size[1] = rows.view.size[2], one.stride[1] = 1;
    return one;
  };
  for (std::int64_t t = 0; t < tokens; ++t) {
    Floats now({batch, channels}), next({batch, channels, states});
    TensorView before = next.view;
    before.data = state.data();
    Step step{before, token(x, t), token(dt, t), A.view, token(B, t), token(C, t)};
    step.softplus = true, step.out = now.view, step.new_state = next.data.data();
    check_step("scan_test", step);
    selective_step(step, three_threads);
    for (std::int64_t b = 0; b < batch; ++b)
      for (std::int64_t e = 0; e < channels; ++e) y[(b * tokens + t) * channels + e] = now[b * channels + e];
    state = next.data;
  }
  expect_close(out, y, what);
  expect_close(last, Sums(state.begin(), state.end() - 1), what + ", state");
}

void test_conv(const Shape& shape, std::int64_t width) {
  const auto& [batch, tokens, channels, states, cuts] = shape;
  const std::string what = "conv of width " + std::to_string(width) + ", " + std::to_string(tokens) + " tokens: ";
  std::mt19937 random(9);
  const auto all = sequences_of(batch, tokens, cuts);
  const auto count = static_cast<std::int64_t>(all.size());
  const std::vector<std::int64_t> wide{batch, tokens, channels};
  const Normal x(wide, random), dout(wide, random), weight({channels, width}, random), bias({channels}, random);
  const Normal initial({count, width - 1, channels}, random);
  Dense<std::int32_t> offsets({count + 1});
  for (std::size_t i = 0; i < cuts.size(); ++i) offsets.data[i] = cuts[i];
  Floats out(wide), dx(wide), dweight({channels, width}), dbias({channels}), dinitial({count, width - 1, channels});
  CausalConv args{x.view, weight.view, &bias.view, &initial.view, cuts.empty() ? nullptr : &offsets.view, true, out.view};
  check_conv("scan_test", args);
  causal_conv(args, three_threads);
  CausalConvBackward back{args, dout.view, dx.view, dweight.data.data(), dbias.data.data(), &dinitial.view};
  causal_conv_backward(back, three_threads);
  Sums y(batch * tokens * channels), gx(y), gw(channels * width), gb(channels), gi(count * (width - 1) * channels);
  for (std::int64_t s = 0; s < count; ++s)
    for (std::int64_t t = all[s].begin; t < all[s].end; ++t)
      for (std::int64_t e = 0; e < channels; ++e) {
        const std::int64_t i = (all[s].row * tokens + t) * channels + e;
        // Tap k reads the token at `from`, of x or of the initial state.
        const auto from = [&](std::int64_t k) { return t - width + 1 + k - all[s].begin; };
        const auto before = [&](std::int64_t k) { return (s * (width - 1) + width - 1 + from(k)) * channels + e; };
        double sum = bias[e];
        for (std::int64_t k = 0; k < width; ++k)
          sum += weight[e * width + k] * (from(k) < 0 ? initial[before(k)] : x[i - (width - 1 - k) * channels]);
        const double open = 1.0 / (1.0 + std::exp(-sum)), g = dout[i] * open * (1.0 + sum * (1.0 - open));
        y[i] = sum * open, gb[e] += g;
        for (std::int64_t k = 0; k < width; ++k) {
          const std::int64_t read = i - (width - 1 - k) * channels;
          gw[e * width + k] += g * (from(k) < 0 ? initial[before(k)] : x[read]);
          (from(k) < 0 ? gi[before(k)] : gx[read]) += g * weight[e * width + k];
        }
      }
  expect_close(out, y, what + "out"), expect_close(dx, gx, what + "dx"), expect_close(dweight, gw, what + "dweight");
  expect_close(dbias, gb, what + "dbias"), expect_close(dinitial, gi, what + "dinitial");
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
  const Floats x({1, 4, 3}), A({3, 2}), B({1, 4, 2}), short_B({1, 3, 2}), wide_A({3, 257}), wide_B({1, 4, 257});
  Dense<std::int32_t> offsets({3});
  const auto scan = [&](const Floats& A, const Floats& B, const TensorView* offsets) {
    Scan args{x.view, x.view, A.view, B.view, B.view};
    args.offsets = offsets;
    check_scan("f", args);
  };
  expect_refusal("B must have shape [1, 4, 2]", [&] { scan(A, short_B, nullptr); });
  expect_refusal("A has 257 states but 1 to 256 are supported", [&] { scan(wide_A, wide_B, nullptr); });
  offsets.data = {0, 3, 2, 0}, offsets.view.data = offsets.data.data();
  expect_refusal("offsets must not fall", [&] { scan(A, B, &offsets.view); });
  offsets.data[2] = 5;
  expect_refusal("offsets[2] must be the 4 tokens of x but is 5", [&] { scan(A, B, &offsets.view); });
  const Floats taps({3, 9});
  expect_refusal("weight has 9 taps but 2 to 8 are supported", [&] { check_conv("f", {x.view, taps.view}); });
}

void run() {
  const Shape shapes[] = {{1, 1, 1, 1, {}},    {2, 0, 3, 2, {}},     {2, 7, 5, 3, {}},
                          {1, 70, 33, 16, {}}, {2, 40, 17, 100, {}}, {1, 50, 24, 16, {0, 3, 3, 20, 49, 50}}};
  for (const Shape& shape : shapes) {
    for (const std::int64_t keep : {8, 64}) test_scan(shape, keep);
    for (const std::int64_t width : {2, 4, 8}) test_conv(shape, width);
  }
  test_steps(1, 1), test_steps(33, 16), test_steps(5, 256);
  test_refusals();
}

const test::Suite suite(run);

}  // namespace
