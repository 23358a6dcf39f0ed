// The core's low-rank linear layer alone, without torch or Python: against sums written out in double precision.
#include "effcore/lowrank.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <string>

#include "test.h"

using namespace effcore;
using namespace effcore::lowrank;

namespace {

using test::Dense, test::expect, test::three_threads;

double activated(double x, Activation activation) {
  switch (activation) {
    case Activation::relu: return std::max(x, 0.0);
    case Activation::gelu: return x / 2 * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh: return x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::silu: return x / (1 + std::exp(-x));
    default: return x;
  }
}

template <class T>
void check_linear_of(std::int64_t rows, std::int64_t in, std::int64_t rank, std::int64_t columns, Activation activation) {
  std::mt19937 random(1);
  Dense<T> x({rows, in}), down({rank, in}), up({columns, rank}), bias({columns});
  for (Dense<T>* t : {&x, &down, &up, &bias}) t->randomize(random);
  Dense<T> out({rows, columns}), hidden({rows, rank}), before({rows, columns});
  linear({x.view, down.view, up.view, &bias.view, activation, out.view, hidden.view.data, before.view.data}, three_threads);
  double worst = 0, largest = 0;
  for (std::int64_t m = 0; m < rows; ++m)
    for (std::int64_t n = 0; n < columns; ++n) {
      double sum = bias[n], terms = std::fabs(sum);
      for (std::int64_t r = 0; r < rank; ++r) {
        double inner = 0;
        for (std::int64_t i = 0; i < in; ++i) inner += x[m * in + i] * down[r * in + i];
        sum += static_cast<T>(static_cast<float>(inner)) * up[n * rank + r];  // the kernel rounds it, too
        terms += std::fabs(inner * up[n * rank + r]);
      }
      const double errors[] = {std::fabs(before[m * columns + n] - sum),
                               std::fabs(out[m * columns + n] - activated(sum, activation))};
      for (const double error : errors) worst = error <= worst ? worst : error;  // NaN is kept
      largest = std::max(largest, terms);
    }
  const double allowed = (sizeof(T) == 2 ? 0x1p-7 : 0x1p-19) * largest;
  expect(worst <= allowed, std::string("lowrank_linear in ") + (sizeof(T) == 2 ? "bfloat16 of " : "float32 of ") +
                               std::to_string(rows) + " rows, " + std::to_string(in) + " to " + std::to_string(rank) + " to " +
                               std::to_string(columns) + ": error " + std::to_string(worst));
}

template <class T>
void check_all() {
  for (const std::int64_t rows : {1, 2, 3, 7, 16, 33})
    for (const std::int64_t in : {1, 64, 101}) {
      check_linear_of<T>(rows, in, 1, 67, Activation::none);
      check_linear_of<T>(rows, in, 35, 1, Activation::relu);
      check_linear_of<T>(rows, in, 35, 129, static_cast<Activation>(2 + rows % 3));
    }
}

void run() {
  check_all<float>();
  check_all<test::BFloat16>();
}

const test::Suite suite(run);

}  // namespace
