// Arrays of any Python library as the core's views, through DLPack (https://dmlc.github.io/dlpack): no copy, no NumPy headers,
// no torch. NumPy exchanges no bfloat16, so an array of ml_dtypes.bfloat16 is lent as the bits of its uint16 view.
#pragma once
#include <ATen/dlpack.h>  // a plain C header; nothing of torch is used or linked
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>

#include "effcore/error.h"
#include "effcore/tensor.h"

namespace effcore::python {

namespace py = pybind11;

// Where results are made and when GPU memory is valid: numpy.empty or cupy.empty, and the stream that the kernels run on
// (as DLPack counts: 1 is CUDA's default stream; 0 where there are no streams).
struct Context {
  const char* function;  // in messages: effcore.<function>
  py::object empty;
  std::int64_t stream = 0;
};

[[noreturn]] inline void refuse_type(const char* function, const char* argument, py::handle got, const char* wanted) {
  const py::handle type = py::type::handle_of(got);
  std::string module = py::str(type.attr("__module__")), name = py::str(type.attr("__qualname__"));
  if (module != "builtins") name = module + "." + name;
  throw py::type_error("effcore." + std::string(function) + ": " + argument + " must be " + wanted + ", got " + name);
}

// One array, borrowed for as long as this lives. Constructed and destroyed under the GIL; read without it.
class Array {
 public:
  Array(const Context& context, const char* argument, py::object object) : object_(std::move(object)) {
    if (!py::hasattr(object_, "__dlpack__")) refuse_type(context.function, argument, object_, "an array (NumPy, CuPy)");
    open(context, argument);
    fill_view(context.function, argument);
  }

  // A fresh, uninitialised array. `dtype` is anything that numpy.empty takes.
  Array(const Context& context, std::initializer_list<std::int64_t> sizes, py::handle dtype, bool token_major = false)
      : object_(make(context, sizes, dtype, token_major)) {
    open(context, "the result");
    fill_view(context.function, "the result", true);
    check(!read_only_, context.function, "the array that was made for the result is read-only");
  }

  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  const TensorView& view() const { return view_; }
  void* data() const { return view_.data; }
  const py::object& object() const { return object_; }
  py::object dtype() const { return object_.attr("dtype"); }

  // Whether heads stand inside tokens in memory, as in a projection that is viewed as heads.
  bool token_major() const { return view_.rank == 4 && std::abs(view_.stride[1]) < std::abs(view_.stride[2]); }

  bool contiguous() const {
    std::int64_t step = 1;
    for (int d = view_.rank - 1; d >= 0; --d) {
      if (view_.size[d] == 0) return true;
      if (view_.size[d] != 1 && view_.stride[d] != step) return false;
      step *= view_.size[d];
    }
    return true;
  }

 private:
  static py::object make(const Context& context, std::initializer_list<std::int64_t> sizes, py::handle dtype,
                         bool token_major) {
    py::tuple shape(sizes.size());
    std::size_t d = 0;
    for (const std::int64_t size : sizes) shape[d++] = size;
    if (!token_major) return context.empty(shape, dtype);
    return context.empty(py::make_tuple(shape[0], shape[2], shape[1], shape[3]), dtype).attr("swapaxes")(1, 2);
  }

  // __dlpack__, with the stream that will read the memory where that is on a GPU. Null with a Python error set on failure.
  static PyObject* export_capsule(py::handle object, std::int64_t stream) {
    py::dict arguments;
    arguments["max_version"] = py::make_tuple(1, 0);
    if (stream != 0 && py::cast<int>(object.attr("__dlpack_device__")()[py::int_(0)]) != kDLCPU) arguments["stream"] = stream;
    const py::object method = object.attr("__dlpack__");
    PyObject* capsule = PyObject_Call(method.ptr(), py::tuple().ptr(), arguments.ptr());
    if (capsule != nullptr || !PyErr_ExceptionMatches(PyExc_TypeError)) return capsule;
    PyErr_Clear();  // made before DLPack 1.0: no max_version
    PyDict_DelItemString(arguments.ptr(), "max_version");
    return PyObject_Call(method.ptr(), py::tuple().ptr(), arguments.ptr());
  }

  void open(const Context& context, const char* argument) {
    PyObject* capsule = export_capsule(object_, context.stream);
    if (capsule == nullptr && PyErr_ExceptionMatches(PyExc_BufferError)) {
      py::error_already_set refusal;
      const py::object dtype = py::getattr(object_, "dtype", py::none());
      bits_of_bfloat16_ = py::str(py::getattr(dtype, "name", py::none())).cast<std::string>() == "bfloat16";
      if (!bits_of_bfloat16_) {
        fail(context.function, argument, " of dtype ", std::string(py::str(dtype)),
             " cannot be used: ", std::string(py::str(refusal.value())));
      }
      capsule = export_capsule(object_.attr("view")("uint16"), context.stream);
    }
    if (capsule == nullptr) throw py::error_already_set();
    take(py::reinterpret_steal<py::object>(capsule), context.function, argument);
  }

  // From here on the memory is ours to give back: the renamed capsule no longer does it.
  void take(const py::object& capsule, const char* function, const char* argument) {
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
      auto* managed = static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
      check(managed->version.major == 1, function, argument, " speaks DLPack ", managed->version.major, ", not 1");
      versioned_.reset(managed);
      tensor_ = &managed->dl_tensor;
      read_only_ = (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
      PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
    } else {
      legacy_.reset(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor")));
      if (legacy_ == nullptr) throw py::error_already_set();
      tensor_ = &legacy_->dl_tensor;
      PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    }
  }

  DType dtype_of(const DLDataType& type) const {
    if (type.lanes != 1) return DType::other;
    const int code = type.code;
    if (code == kDLFloat && type.bits == 32) return DType::float32;
    if (code == kDLFloat && type.bits == 64) return DType::float64;
    if (code == kDLFloat && type.bits == 16) return DType::float16;
    if (code == kDLBfloat && type.bits == 16) return DType::bfloat16;
    if (code == kDLUInt && type.bits == 16 && bits_of_bfloat16_) return DType::bfloat16;
    if (code == kDLInt && type.bits == 32) return DType::int32;
    return DType::other;
  }

  void fill_view(const char* function, const char* argument, bool scratch = false) {
    check(tensor_->ndim <= max_rank, function, argument, " must have at most ", max_rank, " dimensions, got ", tensor_->ndim);
    const int device = tensor_->device.device_type;
    view_.data = static_cast<char*>(tensor_->data) + tensor_->byte_offset;
    view_.dtype = dtype_of(tensor_->dtype);
    check(view_.dtype != DType::other || scratch, function, argument, " is ", std::string(py::str(object_.attr("dtype"))),
          " but float32, float64, float16, bfloat16 and (for lengths, first_key and lists of tokens) int32 are supported");
    view_.device = device == kDLCPU                                ? DeviceKind::cpu
                   : device == kDLCUDA || device == kDLCUDAManaged ? DeviceKind::cuda
                                                                   : DeviceKind::other;
    view_.device_index = tensor_->device.device_id;
    view_.rank = tensor_->ndim;
    // Without strides the array is contiguous; those of an empty array mean nothing (NumPy writes zeros).
    const bool has_strides =
        tensor_->strides != nullptr && std::find(tensor_->shape, tensor_->shape + view_.rank, 0) == tensor_->shape + view_.rank;
    std::int64_t step = 1;
    for (int d = view_.rank - 1; d >= 0; --d) {
      view_.size[d] = tensor_->shape[d];
      view_.stride[d] = has_strides ? tensor_->strides[d] : step;
      step *= std::max<std::int64_t>(view_.size[d], 1);
    }
    const std::uintptr_t item = tensor_->dtype.bits / 8;
    check(item == 0 || reinterpret_cast<std::uintptr_t>(view_.data) % item == 0, function, argument,
          " is not aligned to its items of ", item, " bytes: pass a copy");
  }

  // Gives the memory back, also where a constructor refuses what it has opened.
  struct GiveBack {
    void operator()(auto* managed) const {
      if (managed->deleter != nullptr) managed->deleter(managed);
    }
  };

  py::object object_;
  std::unique_ptr<DLManagedTensorVersioned, GiveBack> versioned_;
  std::unique_ptr<DLManagedTensor, GiveBack> legacy_;
  const DLTensor* tensor_ = nullptr;
  TensorView view_;
  bool read_only_ = false;
  bool bits_of_bfloat16_ = false;
};

}  // namespace effcore::python
