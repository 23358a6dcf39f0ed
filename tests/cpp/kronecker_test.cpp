// The core's Gram matrices alone, without torch or Python: against sums written out in double precision.
#include "effcore/kronecker.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "effcore/error.h"
#include "test.h"

using namespace effcore;
using namespace effcore::kronecker;

namespace {

using test::expect;

TensorView view_of(void* data, DType dtype, std::vector<std::int64_t> sizes, std::vector<std::int64_t> strides) {
  TensorView v;
  v.data = data;
  v.dtype = dtype;
  v.device = DeviceKind::cpu;
  v.rank = static_cast<int>(sizes.size());
  for (int i = 0; i < v.rank; ++i) v.size[i] = sizes[i], v.stride[i] = strides[i];
  return v;
}

void check_gram_of(std::int64_t dim, std::vector<std::int32_t> offsets, double alpha, double beta) {
  const std::int64_t tokens = offsets.back() + 2, row = dim + 3, experts = static_cast<std::int64_t>(offsets.size()) - 1;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> x(tokens * row), out(experts * dim * dim, std::nanf(""));
  for (float& value : x) value = normal(random);
  if (beta != 0)
    for (std::int64_t e = 0; e < experts; ++e)
      for (std::int64_t i = 0; i < dim; ++i)
        for (std::int64_t j = i; j < dim; ++j) out[(e * dim + i) * dim + j] = out[(e * dim + j) * dim + i] = normal(random);
  const std::vector<float> before = out;
  GroupedGram args{view_of(x.data(), DType::float32, {tokens, dim}, {row, 1}),
                   view_of(offsets.data(), DType::int32, {experts + 1}, {1}), alpha, beta};
  args.result = out.data();
  args.previous = beta != 0 ? out.data() : nullptr;
  check_tokens("grouped_gram", args.x, args.offsets);
  grouped_gram(args, test::three_threads);
  double worst = 0;
  bool symmetric = true;
  for (std::int64_t e = 0; e < experts; ++e)
    for (std::int64_t i = 0; i < dim; ++i)
      for (std::int64_t j = 0; j < dim; ++j) {
        const std::int64_t at = (e * dim + i) * dim + j;
        double sum = 0;
        for (std::int64_t t = offsets[e]; t < offsets[e + 1]; ++t) sum += double{x[t * row + i]} * x[t * row + j];
        const double exact = alpha * sum + (beta != 0 ? beta * before[at] : 0);
        const double error = std::fabs(out[at] - exact);
        worst = error <= worst ? worst : error;  // NaN is kept
        symmetric = symmetric && out[at] == out[(e * dim + j) * dim + i];
      }
  expect(worst < 2e-3 && symmetric, "grouped_gram of dimension " + std::to_string(dim) + ": error " + std::to_string(worst));
}

void refused(const char* what, std::vector<std::int32_t> offsets) {
  std::vector<float> x(12);
  const TensorView tokens = view_of(x.data(), DType::float32, {6, 2}, {2, 1});
  try {
    check_tokens("grouped_gram", tokens,
                 view_of(offsets.data(), DType::int32, {static_cast<std::int64_t>(offsets.size())}, {1}));
    expect(false, std::string("offsets are refused: ") + what);
  } catch (const std::invalid_argument& error) {
    expect(std::string(error.what()).find("offsets") != std::string::npos, what);
  }
}

void run() {
  for (const std::int64_t dim : {1, 7, 64, 65, 129, 257, 300}) {
    check_gram_of(dim, {0, 0, 3, 40, 40}, 1.0, 0.0);
    check_gram_of(dim, {2, 5, 5, 70}, 0.5, -2.0);
  }
  check_gram_of(33, {1, 9000, 9001}, 1.0, 1.0);  // several segments
  for (const std::int64_t dim : {720, 733}) {    // more than 16 MiB of results, in whole lines and not
    check_gram_of(dim, {0, 3, 3, 5, 6, 8, 9, 9, 12, 13}, 1.0, 0.0);
    check_gram_of(dim, {0, 3, 3, 5, 6, 8, 9, 9, 12, 13}, -0.5, 2.0);
  }
  refused("falling", {0, 3, 2});
  refused("behind the tokens", {0, 7});
  refused("negative", {-1, 6});
  refused("none", {});
}

const test::Suite suite(run);

}  // namespace
