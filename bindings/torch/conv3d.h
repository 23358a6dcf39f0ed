// The conv3d family as torch ops: check, allocate, call. One template serves the CPU and the CUDA library; a Backend says how
// to run a kernel (`static void run(const Args&, const Tensor& on)`).
#pragma once
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/torch/tensor.h"
#include "effcore/conv3d.h"

namespace effcore::binding {

template <class Backend>
struct Conv3dOps {
  // Kernels want channels on end: another layout is copied, a slice of channels is not.
  static Tensor channels_last(const Tensor& t) {
    if (t.dim() != 5 || t.size(1) <= 1 || t.stride(1) == 1) return t;
    return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast3d);
  }
  static Tensor voxels(const Tensor& like, std::int64_t batch, std::int64_t channels, const std::int64_t (&size)[3]) {
    const std::int64_t sizes[] = {batch, channels, size[0], size[1], size[2]};
    const std::int64_t w = channels, h = w * size[2], t = h * size[1], b = t * size[0];
    const std::int64_t strides[] = {b, 1, t, h, w};
    return empty_strided(like, sizes, strides, 5, like.scalar_type());
  }
  static conv3d::Geometry geometry(const char* f, const std::vector<std::int64_t>& stride,
                                   const std::vector<std::int64_t>& padding) {
    check(stride.size() == 3, f, "stride must have 3 numbers (t, h, w), got ", stride.size());
    check(padding.size() == 3, f, "padding must have 3 numbers (t, h, w), got ", padding.size());
    conv3d::Geometry g;
    std::copy_n(stride.data(), 3, g.stride);
    std::copy_n(padding.data(), 3, g.padding);
    conv3d::check_geometry(f, g);
    return g;
  }

  static Tensor forward(const Tensor& x, const Tensor& spatial, const Tensor& temporal, const std::optional<Tensor>& bias,
                        const std::vector<std::int64_t>& stride, const std::vector<std::int64_t>& padding) {
    const char* f = "cross_conv3d";
    const Tensor source = channels_last(x);
    conv3d::Forward args{view(source, f, "x"), view(spatial, f, "spatial"), view(temporal, f, "temporal")};
    conv3d::check_voxels(f, "x", args.x, nullptr);
    conv3d::check_kernels(f, args.spatial, args.temporal, args.x);
    check(args.spatial.size[1] == args.x.size[1], f, "spatial has ", args.spatial.size[1], " input channels but x has ",
          args.x.size[1], " (groups are not supported)");
    TensorView vbias;
    if (bias) {
      vbias = view(*bias, f, "bias");
      conv3d::check_bias(f, vbias, args.spatial);
      args.bias = &vbias;
    }
    args.geometry = geometry(f, stride, padding);
    const std::int64_t kernel[3] = {args.temporal.size[2], args.spatial.size[2], args.spatial.size[3]};
    std::int64_t size[3];
    conv3d::check_positions(f, args.x.size + 2, kernel, args.geometry, size);
    Tensor out = voxels(x, args.x.size[0], args.spatial.size[0], size);
    args.out = view(out, f, "out");
    Backend::run(args, x);
    return out;
  }

  static Tensor backward_data(const Tensor& dout, const Tensor& spatial, const Tensor& temporal,
                              const std::vector<std::int64_t>& stride, const std::vector<std::int64_t>& padding,
                              std::int64_t frames, std::int64_t height, std::int64_t width) {
    const char* f = "cross_conv3d_bwd_data";
    const Tensor source = channels_last(dout);
    conv3d::BackwardData args{view(source, f, "dout"), view(spatial, f, "spatial"), view(temporal, f, "temporal")};
    conv3d::check_voxels(f, "dout", args.dout, nullptr);
    conv3d::check_kernels(f, args.spatial, args.temporal, args.dout);
    args.geometry = geometry(f, stride, padding);
    const std::int64_t kernel[3] = {args.temporal.size[2], args.spatial.size[2], args.spatial.size[3]};
    const std::int64_t size[3] = {frames, height, width};
    for (const std::int64_t n : size) check(n >= 1, f, "x must have a voxel, got size ", shape({frames, height, width}));
    std::int64_t out[3];
    conv3d::check_positions(f, size, kernel, args.geometry, out);
    check_sizes(f, "dout", args.dout, {args.dout.size[0], args.spatial.size[0], out[0], out[1], out[2]});
    Tensor dx = voxels(dout, args.dout.size[0], args.spatial.size[1], size);
    args.dx = view(dx, f, "dx");
    Backend::run(args, dout);
    return dx;
  }

  static std::tuple<Tensor, Tensor> backward_weight(const Tensor& x, const Tensor& dout,
                                                    const std::vector<std::int64_t>& kernel,
                                                    const std::vector<std::int64_t>& stride,
                                                    const std::vector<std::int64_t>& padding, bool channels_inside) {
    const char* f = "cross_conv3d_bwd_weight";
    const Tensor source = channels_last(x), gradient = channels_last(dout);
    conv3d::BackwardWeight args{view(source, f, "x"), view(gradient, f, "dout")};
    conv3d::check_voxels(f, "x", args.x, nullptr);
    conv3d::check_voxels(f, "dout", args.dout, &args.x);
    check(kernel.size() == 3, f, "kernel must have 3 numbers (t, h, w), got ", kernel.size());
    for (const std::int64_t n : kernel)
      check(n >= 1 && n % 2 == 1, f, "kernel must be odd, got (", kernel[0], ", ", kernel[1], ", ", kernel[2], ')');
    args.geometry = geometry(f, stride, padding);
    std::int64_t out[3];
    conv3d::check_positions(f, args.x.size + 2, kernel.data(), args.geometry, out);
    const std::int64_t columns = args.dout.size[1], channels = args.x.size[1];
    check_sizes(f, "dout", args.dout, {args.x.size[0], columns, out[0], out[1], out[2]});
    // In memory as the kernels are, so that nobody has to copy them: channels outside or inside of the taps.
    const auto kernel_like = [&](const std::int64_t* sizes, std::int64_t rank) {
      std::int64_t strides[4], taps = 1;
      for (std::int64_t d = rank - 1; d >= 2; --d) strides[d] = channels_inside ? taps * channels : taps, taps *= sizes[d];
      strides[1] = channels_inside ? 1 : taps, strides[0] = taps * channels;
      return empty_strided(x, sizes, strides, rank, x.scalar_type());
    };
    const std::int64_t across[] = {columns, channels, kernel[1], kernel[2]}, along[] = {columns, channels, kernel[0]};
    Tensor dspatial = kernel_like(across, 4), dtemporal = kernel_like(along, 3);
    args.dspatial = view(dspatial, f, "dspatial");
    args.dtemporal = view(dtemporal, f, "dtemporal");
    Backend::run(args, x);
    return {dspatial, dtemporal};
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    EFFCORE_IMPL(m, "cross_conv3d", forward);
    EFFCORE_IMPL(m, "cross_conv3d_bwd_data", backward_data);
    EFFCORE_IMPL(m, "cross_conv3d_bwd_weight", backward_weight);
  }
};

}  // namespace effcore::binding
