// The core's cross-shaped convolution alone, without torch or Python: against sums written out in double precision.
#include "effcore/conv3d.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "test.h"

using namespace effcore;
using namespace effcore::conv3d;

namespace {

using test::Dense, test::expect, test::three_threads;

// [B, channels, T, H, W], channels on end in memory.
template <class T>
Dense<T> voxels(std::int64_t batch, std::int64_t channels, const std::int64_t (&size)[3]) {
  Dense<T> dense({batch, size[0], size[1], size[2], channels});
  const TensorView v = dense.view;
  for (int d = 0; d < 5; ++d) {
    const int from = d == 0 ? 0 : d == 1 ? 4 : d - 1;
    dense.view.size[d] = v.size[from], dense.view.stride[d] = v.stride[from];
  }
  return dense;
}

struct Shape {
  std::int64_t batch, channels, columns, size[3], kernel[3], stride[3], padding[3];
};

// Calls body(b, o, c, position of dout, position of x, tap) for each product of the dense convolution that is on the cross.
template <class Body>
void for_products(const Shape& s, const std::int64_t (&out)[3], const Body& body) {
  const auto& [kt, kh, kw] = s.kernel;
  for (std::int64_t b = 0; b < s.batch; ++b)
    for (std::int64_t t = 0; t < out[0]; ++t)
      for (std::int64_t h = 0; h < out[1]; ++h)
        for (std::int64_t w = 0; w < out[2]; ++w)
          for (std::int64_t l = 0; l < kt; ++l)
            for (std::int64_t i = 0; i < kh; ++i)
              for (std::int64_t j = 0; j < kw; ++j) {
                const bool across = l == kt / 2, along = i == kh / 2 && j == kw / 2;
                const std::int64_t p[3] = {t, h, w}, tap[3] = {l, i, j};
                std::int64_t q[3];
                bool inside = across || along;
                for (int d = 0; d < 3; ++d) {
                  q[d] = s.stride[d] * p[d] + tap[d] - s.padding[d];
                  inside = inside && q[d] >= 0 && q[d] < s.size[d];
                }
                for (std::int64_t o = 0; inside && o < s.columns; ++o)
                  for (std::int64_t c = 0; c < s.channels; ++c) body(b, o, c, p, q, tap, across, along);
              }
}

template <class T>
double worst_error(const Dense<T>& got, const std::vector<double>& exact) {
  double worst = 0, largest = 1e-300;
  for (const double x : exact) largest = std::max(largest, std::fabs(x));
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double error = std::fabs(got[i] - exact[i]) / largest;
    worst = error <= worst ? worst : error;  // NaN is kept
  }
  return worst;
}

template <class T>
void check_cross(const Shape& s) {
  std::mt19937 random(1);
  Geometry geometry;
  std::int64_t out[3];
  std::copy_n(s.stride, 3, geometry.stride);
  std::copy_n(s.padding, 3, geometry.padding);
  check_positions("cross_conv3d", s.size, s.kernel, geometry, out);
  Dense<T> x = voxels<T>(s.batch, s.channels, s.size), dout = voxels<T>(s.batch, s.columns, out);
  Dense<T> spatial({s.columns, s.channels, s.kernel[1], s.kernel[2]}), temporal({s.columns, s.channels, s.kernel[0]});
  for (Dense<T>* t : {&x, &dout, &spatial, &temporal}) t->randomize(random);
  Dense<T> y = voxels<T>(s.batch, s.columns, out), dx = voxels<T>(s.batch, s.channels, s.size);
  Dense<T> dspatial({s.columns, s.channels, s.kernel[1], s.kernel[2]}), dtemporal({s.columns, s.channels, s.kernel[0]});
  forward({x.view, spatial.view, temporal.view, nullptr, geometry, y.view}, three_threads);
  backward_data({dout.view, spatial.view, temporal.view, geometry, dx.view}, three_threads);
  backward_weight({x.view, dout.view, geometry, dspatial.view, dtemporal.view}, three_threads);

  const auto zeros = [](const Dense<T>& like) { return std::vector<double>(like.data.size() - 1); };
  std::vector<double> y_ = zeros(y), dx_ = zeros(dx), dspatial_ = zeros(dspatial), dtemporal_ = zeros(dtemporal);
  const auto place = [](const Dense<T>& t, std::int64_t b, std::int64_t c, const std::int64_t* p) {
    const std::int64_t* stride = t.view.stride;
    return b * stride[0] + c * stride[1] + p[0] * stride[2] + p[1] * stride[3] + p[2] * stride[4];
  };
  for_products(s, out, [&](auto b, auto o, auto c, const auto* p, const auto* q, const auto* tap, bool across, bool along) {
    const std::int64_t wide = ((o * s.channels + c) * s.kernel[1] + tap[1]) * s.kernel[2] + tap[2];
    const std::int64_t thin = (o * s.channels + c) * s.kernel[0] + tap[0];
    const double weight = (across ? spatial[wide] : 0.0) + (along ? temporal[thin] : 0.0);
    const double from = x[place(x, b, c, q)], gradient = dout[place(dout, b, o, p)];
    y_[place(y, b, o, p)] += weight * from;
    dx_[place(dx, b, c, q)] += weight * gradient;
    if (across) dspatial_[wide] += from * gradient;
    if (along) dtemporal_[thin] += from * gradient;
  });
  const double allowed = sizeof(T) == 2 ? 0x1p-8 : 0x1p-20;
  const std::string what = std::string(sizeof(T) == 2 ? "bfloat16" : "float32") + ", " + std::to_string(s.channels) + " to " +
                           std::to_string(s.columns) + " channels";
  expect(worst_error(y, y_) <= allowed, "cross_conv3d of " + what);
  expect(worst_error(dx, dx_) <= allowed, "its gradient of the data, " + what);
  expect(worst_error(dspatial, dspatial_) <= allowed && worst_error(dtemporal, dtemporal_) <= allowed,
         "its gradient of the kernels, " + what);
}

void run() {
  const Shape shapes[] = {
      {1, 1, 1, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}},     {2, 5, 33, {3, 5, 7}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}},
      {1, 33, 7, {4, 9, 6}, {3, 5, 3}, {2, 1, 3}, {1, 0, 2}},  // positions that no tap reaches, frames that do not exist
      {2, 16, 65, {2, 11, 13}, {5, 3, 1}, {1, 2, 2}, {4, 1, 0}}, {0, 3, 4, {2, 3, 3}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}},
  };
  for (const Shape& shape : shapes) {
    check_cross<float>(shape);
    check_cross<test::BFloat16>(shape);
  }
}

const test::Suite suite(run);

}  // namespace
