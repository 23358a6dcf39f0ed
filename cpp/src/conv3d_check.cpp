// Which arguments the cross-shaped convolution takes. Everything is refused here, by name, before a kernel runs.
#include "effcore/conv3d.h"
#include "effcore/error.h"

namespace effcore::conv3d {

using effcore::check;

namespace {

void check_like(const char* function, const char* argument, const TensorView& t, const TensorView& like) {
  check(t.dtype == like.dtype, function, argument, " is ", name(t.dtype), " but must be ", name(like.dtype),
        " as the others are");
  check(t.device == like.device && t.device_index == like.device_index, function, argument, " is on ", place(t),
        " but the others are on ", place(like));
}

}  // namespace

void check_voxels(const char* function, const char* argument, const TensorView& t, const TensorView* like) {
  check_supported(function, argument, t);
  check(t.rank == 5, function, argument, " must have 5 dimensions [batch, channels, frames, height, width] but has shape ",
        shape(t));
  for (int d = 1; d < 5; ++d)
    check(t.size[d] >= 1, function, argument, " has shape ", shape(t), " but only the batch may be empty");
  check(t.size[1] <= 1 || t.stride[1] == 1, function, argument,
        " must be contiguous along its channels (channels_last_3d) but has stride ", t.stride[1], " there");
  if (like != nullptr) check_like(function, argument, t, *like);
}

void check_kernels(const char* function, const TensorView& spatial, const TensorView& temporal, const TensorView& like) {
  check(spatial.rank == 4, function, "spatial must have shape [out_channels, in_channels, height, width] but has ",
        shape(spatial));
  check(temporal.rank == 3, function, "temporal must have shape [out_channels, in_channels, frames] but has ", shape(temporal));
  check_like(function, "spatial", spatial, like);
  check_like(function, "temporal", temporal, like);
  check(spatial.size[0] >= 1, function, "spatial must have at least one output channel but has shape ", shape(spatial));
  check(temporal.size[0] == spatial.size[0], function, "temporal has ", temporal.size[0], " output channels but spatial has ",
        spatial.size[0]);
  check(temporal.size[1] == spatial.size[1], function, "temporal has ", temporal.size[1], " input channels but spatial has ",
        spatial.size[1]);
  for (int d = 2; d < 4; ++d)
    check(spatial.size[d] % 2 == 1, function, "spatial must have odd sizes (the cross needs a middle pixel) but has shape ",
          shape(spatial));
  check(temporal.size[2] % 2 == 1, function, "temporal must have an odd size (the cross needs a middle frame) but has shape ",
        shape(temporal));
}

void check_bias(const char* function, const TensorView& bias, const TensorView& spatial) {
  check_like(function, "bias", bias, spatial);
  check(bias.rank == 1 && bias.size[0] == spatial.size[0], function, "bias must have shape [", spatial.size[0], "] but has ",
        shape(bias));
}

void check_geometry(const char* function, const Geometry& g) {
  for (int d = 0; d < 3; ++d) {
    check(g.stride[d] >= 1 && g.stride[d] < std::int64_t{1} << 31, function, "stride must be positive, got (", g.stride[0],
          ", ", g.stride[1], ", ", g.stride[2], ')');
    check(g.padding[d] >= 0 && g.padding[d] < std::int64_t{1} << 31, function, "padding must not be negative, got (",
          g.padding[0], ", ", g.padding[1], ", ", g.padding[2], ')');
  }
}

void check_positions(const char* function, const std::int64_t size[3], const std::int64_t kernel[3], const Geometry& g,
                     std::int64_t out[3]) {
  for (int d = 0; d < 3; ++d) {
    check(size[d] + 2 * g.padding[d] >= kernel[d], function, "x has ", shape({size[0], size[1], size[2]}),
          " (frames, height, width), with padding ",
          shape({size[0] + 2 * g.padding[0], size[1] + 2 * g.padding[1], size[2] + 2 * g.padding[2]}), ", which the kernel of ",
          shape({kernel[0], kernel[1], kernel[2]}), " exceeds");
    out[d] = positions(size[d], kernel[d], g.stride[d], g.padding[d]);
  }
}

void check_patches(const char* function, const TensorView& x, const TensorView& weight) {
  check_supported(function, "x", x);
  check(x.rank == 5, function, "x must have 5 dimensions [batch, channels, frames, height, width] but has shape ", shape(x));
  check(weight.rank == 5, function, "weight must have shape [out_channels, in_channels, frames, height, width] but has ",
        shape(weight));
  check_like(function, "weight", weight, x);
  for (int d = 0; d < 5; ++d) check(weight.size[d] >= 1, function, "weight must not be empty but has shape ", shape(weight));
  check(weight.size[1] == x.size[1], function, "weight has ", weight.size[1], " input channels but x has ", x.size[1]);
  for (int d = 2; d < 5; ++d)
    check(x.size[d] >= weight.size[d], function, "x of shape ", shape(x), " holds no patch of weight's shape ", shape(weight));
}

}  // namespace effcore::conv3d
