// Live modules on the CPU: a number that tells whether their parameters still are what constants were packed from.
#include <memory>
#include <vector>

#include "operators.h"

namespace fif {
namespace {

// Tensors of a list, as torch hands them over: a Tensor of each costs a live unit more than reading all their values.
class Numbers {
 public:
  explicit Numbers(const std::vector<AtenTensorHandle>& given) : held_(given.begin(), given.end()) {}

  // A number that changes if any value, shape or dtype among the tensors does.
  int64_t fingerprint() const {
    std::vector<Tensor> copies;
    std::vector<const void*> parts;
    std::vector<int64_t> bytes, shapes;
    parts.reserve(held_.size() + 1);
    bytes.reserve(held_.size() + 1);
    shapes.reserve(held_.size() * 5);
    for (const auto& held : held_) {
      const AtenTensorHandle t = held.get();
      int32_t device = 0, dtype = 0;
      int64_t dim = 0, count = 0, *sizes = nullptr;
      bool dense = false;
      check(aoti_torch_get_device_type(t, &device));
      STD_TORCH_CHECK(device == aoti_torch_device_type_cpu(), "tensors must be on the CPU");
      check(aoti_torch_get_dtype(t, &dtype));
      check(aoti_torch_get_dim(t, &dim));
      check(aoti_torch_get_sizes(t, &sizes));
      check(aoti_torch_get_numel(t, &count));
      check(aoti_torch_is_contiguous(t, &dense));
      parts.push_back(nullptr);
      if (dense) {
        check(torch_get_const_data_ptr(t, &parts.back()));
      } else {
        AtenTensorHandle same = nullptr;
        check(aoti_torch_new_tensor_handle(t, &same));
        copies.push_back(torch::stable::contiguous(Tensor(same)));
        parts.back() = copies.back().const_data_ptr();
      }
      bytes.push_back(count * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)));
      shapes.push_back(dtype);
      shapes.insert(shapes.end(), sizes, sizes + dim);
    }
    parts.push_back(shapes.data());
    bytes.push_back(static_cast<int64_t>(shapes.size() * sizeof(int64_t)));
    return static_cast<int64_t>(
        cpu_kernels().fingerprint(parts.data(), bytes.data(), static_cast<int64_t>(parts.size())));
  }

 private:
  struct Delete {
    void operator()(AtenTensorHandle t) const { aoti_torch_delete_tensor_object(t); }
  };
  static void check(AOTITorchError error) {
    STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "a tensor has no values that can be read");
  }
  std::vector<std::unique_ptr<AtenTensorOpaque, Delete>> held_;
};

int64_t fingerprint(std::vector<AtenTensorHandle> tensors) { return Numbers(tensors).fingerprint(); }

// run, for constants that were packed from tensors that may have changed since.
Tensor follow(const Tensor& x, const Tensor& program, const Tensor& packed, std::vector<AtenTensorHandle> numbers,
              int64_t content, int64_t out_channels, int64_t stride) {
  STD_TORCH_CHECK(Numbers(numbers).fingerprint() == content, "the constants were packed from other numbers");
  return run(x, program, packed, out_channels, stride);
}

}  // namespace
}  // namespace fif

STABLE_TORCH_LIBRARY_FRAGMENT(fif_ops, m) {
  m.def("fingerprint(Tensor[] tensors) -> int");
  m.def(
      "follow(Tensor x, Tensor program, Tensor packed, Tensor[] numbers, int content, int out_channels, int stride) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fif_ops, CPU, m) {
  m.impl("fingerprint", TORCH_BOX(&fif::fingerprint));
  m.impl("follow", TORCH_BOX(&fif::follow));
}
