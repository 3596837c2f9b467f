// A simulated Ascend NPU: PyTorch's device for extensions (PrivateUse1) on host memory, named `npu` by path/torch_npu.
//
// Only what gives a tensor its memory or its shape is written here; every other operator is computed by the CPU's kernel.
// As on the real device operators refuse tensors of different devices, memory is counted and can run out, each device has
// its own random numbers, and `hccl` takes tensors of NPUs alone. Unlike the real one it is synchronous.
//
// NPU_SIM_DEVICES  how many there are (8)
// NPU_SIM_MEMORY   bytes of each (64 GiB)

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <map>
#include <span>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using std::optional;
constexpr auto NPU = c10::DeviceType::PrivateUse1;

int64_t setting(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value ? std::stoll(value) : otherwise;
}
const DeviceIndex device_count = setting("NPU_SIM_DEVICES", 8);
const int64_t device_memory = setting("NPU_SIM_MEMORY", int64_t(64) << 30);

thread_local DeviceIndex current = 0;

DeviceIndex exchange(DeviceIndex device) {
  TORCH_CHECK(device >= 0 && device < device_count, "npu:", int(device), " does not exist: there are ", int(device_count));
  return std::exchange(current, device);
}

// ---------------------------------------------------------------- memory

using c10::CachingAllocator::Stat;
using c10::CachingDeviceAllocator::DeviceStats;

auto& lock = *new std::mutex;  // these two outlive Python's last tensors
auto& held = *new std::vector<Stat>(device_count);

struct Memory final : c10::DeviceAllocator {
  struct Block {
    void* data;
    size_t bytes;
    DeviceIndex device;
  };

  c10::DataPtr allocate(size_t bytes) override {
    exchange(current);  // or there is none
    if (bytes == 0) return {nullptr, Device(NPU, current)};
    std::lock_guard locked(lock);
    auto& here = held[current];
    using c10::CachingAllocator::format_size;
    TORCH_CHECK_WITH(OutOfMemoryError, here.current + int64_t(bytes) <= device_memory, "NPU out of memory. Tried to ",
        "allocate ", format_size(bytes), " (NPU ", int(current), "; ", format_size(device_memory), " total capacity; ",
        format_size(here.current), " already allocated)");
    here.increase(bytes);
    auto* block = new Block{c10::alloc_cpu(bytes), bytes, current};
    return {block->data, block, &free, Device(NPU, current)};
  }
  static void free(void* context) {
    std::lock_guard locked(lock);
    std::unique_ptr<Block> block(static_cast<Block*>(context));
    held[block->device].decrease(block->bytes);
    c10::free_cpu(block->data);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  DeviceStats getDeviceStats(DeviceIndex device) override {
    std::lock_guard locked(lock);
    DeviceStats stats;
    stats.allocated_bytes[0] = stats.active_bytes[0] = stats.reserved_bytes[0] = held.at(device);
    return stats;
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    return {device_memory - held.at(device).current, device_memory};
  }
  void resetPeakStats(DeviceIndex device) override { held.at(device).reset_peak(); }
  void resetAccumulatedStats(DeviceIndex device) override { held.at(device).reset_accumulated(); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
};
auto& memory = *new Memory;
REGISTER_ALLOCATOR(NPU, &memory);

// ---------------------------------------------------------------- the device: one stream, and random numbers

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return NPU; }
  DeviceIndex deviceCount() const noexcept override { return device_count; }
  Device getDevice() const override { return {NPU, current}; }
  Device exchangeDevice(Device device) const override { return {NPU, exchange(device.index())}; }
  void setDevice(Device device) const override { exchange(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  void synchronizeDevice(const DeviceIndex) const override {}

  c10::Stream getStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream getNewStream(Device device, int) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}

  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator final : c10::GeneratorImpl {
  at::Generator cpu;  // that the CPU's kernels draw from
  Generator(Device device, at::Generator from)
      : GeneratorImpl(device, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), cpu(std::move(from)) {}
  uint64_t seed() override { return cpu.seed(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  Generator* clone_impl() const override { return new Generator(device(), cpu.clone()); }
};

std::vector<at::Generator> default_generators;

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex device) const override { exchange(device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return exchange(device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return device < 0 ? current : exchange(device); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }  // no copy is asynchronous
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override {
    return default_generators.at(device < 0 ? current : device);
  }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return at::make_generator<Generator>(Device(NPU, device < 0 ? current : device), at::detail::createCPUGenerator());
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DeviceGuard guard(storage.device());
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

// ---------------------------------------------------------------- operators that make, move and reshape tensors

constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

Tensor empty(at::IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<Device> device,
    optional<bool>, optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, optional<at::ScalarType> dtype, optional<at::Layout>,
    optional<Device> device, optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

Tensor on_host(const Tensor& tensor) {  // the same memory, as a tensor of the CPU
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [storage = tensor.storage()](void*) {},
      tensor.options().device(at::kCPU).requires_grad(false));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  return copy_from(from, to.resize_(from.sizes()), false);
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(self.device());
  return at::native::resize_(self, size, format);
}

Tensor& set_storage(Tensor& self, at::Storage storage) {
  const auto size = int64_t(storage.nbytes() / self.itemsize());
  return at::native::set_storage_cpu_(self, std::move(storage), 0, {size}, {});
}

void record_stream(Tensor&, c10::Stream) {}

std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double p, optional<bool> train) {
  // the CPU's kernel takes no generator
  const auto mask = at::empty_like(input, at::kBool).bernoulli_(train.value_or(true) ? 1 - p : 1);
  return {input * mask * (p < 1 && train.value_or(true) ? 1 / (1 - p) : 1), mask};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("unfold", at::native::unfold);
  m.impl("_local_scalar_dense", at::native::_local_scalar_dense_cpu);
  m.impl("record_stream", record_stream);
  m.impl("native_dropout", native_dropout);
}

// ---------------------------------------------------------------- every other operator: checked, then left to the CPU

void fallback(const c10::OperatorHandle& op, c10::Stack* stack) {
  const auto& declared = op.schema().arguments();
  const auto arguments = std::span(*stack).last(declared.size());
  optional<Device> device;
  const auto check = [&](const Tensor& tensor) {
    if (!tensor.defined() || (tensor.is_cpu() && tensor.dim() == 0)) return;  // a number on the CPU goes with every device
    TORCH_CHECK(device.value_or(tensor.device()) == tensor.device(), "Expected all tensors to be on the same device, but "
        "found at least two devices, ", *device, " and ", tensor.device(), "! (", op.operator_name(), ")");
    device = tensor.device();
  };
  for (const auto& argument : arguments) {
    if (argument.isTensor()) {
      check(argument.toTensor());
    } else if (argument.isTensorList()) {
      for (const Tensor& tensor : argument.toTensorVector()) check(tensor);
    } else if (argument.isOptionalTensorList()) {
      for (const optional<Tensor>& tensor : argument.toOptionalTensorVector()) check(tensor.value_or(Tensor()));
    }
  }
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (declared[i].type()->str() == "Generator?") {
      const auto& generator = arguments[i].isNone() ? default_generators.at(device->index()) : arguments[i].toGenerator();
      TORCH_CHECK(generator.device() == device, "Expected a generator of ", *device, ", got one of ", generator.device());
      arguments[i] = static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->cpu;
    }
  }
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

void no_autocast(const c10::OperatorHandle&, c10::Stack*) { TORCH_CHECK(false, "the simulated NPU has no autocast"); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&no_autocast>()); }

// ---------------------------------------------------------------- hccl: gloo, on the same memory

using namespace c10d;
using Tensors = std::vector<Tensor>;
using Lists = std::vector<Tensors>;
using Done = c10::intrusive_ptr<Work>;

Tensor shared(const Tensor& tensor) {
  TORCH_CHECK(tensor.is_privateuseone(), "hccl: tensors must be on an NPU, this one is on ", tensor.device());
  return on_host(tensor);
}
template <class T>
std::vector<T> shared(const std::vector<T>& items) {
  std::vector<T> seen;
  for (const auto& item : items) seen.push_back(shared(item));
  return seen;
}

Tensors flat(const Tensor& tensor) { return {tensor}; }
Tensors flat(const Tensors& tensors) { return tensors; }
Tensors flat(const Lists& lists) {
  Tensors all;
  for (const auto& list : lists) all.insert(all.end(), list.begin(), list.end());
  return all;
}

struct Hccl final : Backend {
  c10::intrusive_ptr<Backend> gloo;
  std::map<std::string, int> calls;

  explicit Hccl(c10::intrusive_ptr<Backend> gloo) : Backend(gloo->getRank(), gloo->getSize()), gloo(std::move(gloo)) {}
  const std::string getBackendName() const override { return "hccl"; }

  template <class Method, class Options, class To, class... From>
  Done run(const char* name, Method method, Options options, To& to, From&... from) {
    ++calls[name];
    bool mean = false;
    if constexpr (requires { options.reduceOp; }) {
      mean = options.reduceOp == ReduceOp::AVG;
      if (mean) options.reduceOp = ReduceOp::SUM;  // gloo has no mean
    }
    auto results = shared(to);
    [&](auto... inputs) { ((*gloo).*method)(results, inputs..., options)->wait(); }(shared(from)...);
    if (mean) {
      for (auto& result : flat(results)) result.div_(getSize());
    }
    // not gloo's own: waiting for that once more writes the sums again
    auto future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::ofTensors());
    future->markCompleted(flat(results));
    return Work::create_from_future(future);
  }

  Done broadcast(Tensors& tensors, const BroadcastOptions& o) override {
    return run("broadcast", &Backend::broadcast, o, tensors);
  }
  Done allreduce(Tensors& tensors, const AllreduceOptions& o) override {
    return run("allreduce", &Backend::allreduce, o, tensors);
  }
  Done allgather(Lists& to, Tensors& from, const AllgatherOptions& o) override {
    return run("allgather", &Backend::allgather, o, to, from);
  }
  Done _allgather_base(Tensor& to, Tensor& from, const AllgatherOptions& o) override {
    return run("allgather", &Backend::_allgather_base, o, to, from);
  }
  Done allgather_into_tensor_coalesced(Tensors& to, Tensors& from, const AllgatherOptions& o) override {
    return run("allgather", &Backend::allgather_into_tensor_coalesced, o, to, from);
  }
  Done reduce_scatter(Tensors& to, Lists& from, const ReduceScatterOptions& o) override {
    return run("reduce_scatter", &Backend::reduce_scatter, o, to, from);
  }
  Done _reduce_scatter_base(Tensor& to, Tensor& from, const ReduceScatterOptions& o) override {
    return run("reduce_scatter", &Backend::_reduce_scatter_base, o, to, from);
  }
  Done reduce_scatter_tensor_coalesced(Tensors& to, Tensors& from, const ReduceScatterOptions& o) override {
    return run("reduce_scatter", &Backend::reduce_scatter_tensor_coalesced, o, to, from);
  }
  Done scatter(Tensors& to, Lists& from, const ScatterOptions& o) override {
    return run("scatter", &Backend::scatter, o, to, from);
  }
  Done barrier(const BarrierOptions& options) override {
    ++calls["barrier"];
    return gloo->barrier(options);
  }
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  m.attr("device_count") = int(device_count);
  for (DeviceIndex i = 0; i < device_count; ++i) {
    default_generators.push_back(at::detail::getPrivateUse1Hooks().getNewGenerator(i));
  }
  m.attr("default_generators") = default_generators;
  py::class_<Hccl, Backend, c10::intrusive_ptr<Hccl>>(m, "Hccl")
      .def(py::init([](c10::intrusive_ptr<Backend> gloo) { return c10::make_intrusive<Hccl>(std::move(gloo)); }))
      .def_readonly("calls", &Hccl::calls, "name of a collective -> how often it was called");
}
