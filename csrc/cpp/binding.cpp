// The Python module nova_kernels._cpp: kernels for tensors on a CPU, by address, without torch.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace {

using nova::cpp::Block;
using nova::cpp::DenoiseArguments;
using nova::cpp::Linear;
using nova::StepNumbers;

const float* pointer(const py::handle& address) {
  return reinterpret_cast<const float*>(address.cast<std::uintptr_t>());
}

Linear linear(const py::handle& addresses) {
  const auto pair = py::cast<py::tuple>(addresses);
  return {pointer(pair[0]), pointer(pair[1])};
}

py::list kernels() {
  py::list result;
  for (const nova::cpp::Kernel& kernel : nova::cpp::kernels()) {
    result.append(py::make_tuple(kernel.name, kernel.panel));
  }
  return result;
}

void denoise(const py::dict& given, std::size_t kernel, int threads, std::uintptr_t parallel) {
  DenoiseArguments a;
  a.tokens = given["tokens"].cast<int>();
  a.passes = given["passes"].cast<int>();
  a.width = given["width"].cast<int>();
  a.token_dim = given["token_dim"].cast<int>();
  std::vector<StepNumbers> steps;
  for (const py::handle numbers : given["steps"]) {
    const auto n = py::cast<py::tuple>(numbers);
    steps.push_back({n[0].cast<float>(), n[1].cast<float>(), n[2].cast<float>(),
                     n[3].cast<float>(), n[4].cast<float>(), n[5].cast<float>()});
  }
  a.embed = linear(given["embed"]);
  a.head = linear(given["head"]);
  std::vector<Block> blocks;
  for (const py::handle entry : given["blocks"]) {
    const auto block = py::cast<py::dict>(entry);
    const Linear norm = linear(block["norm"]);
    blocks.push_back({linear(block["fc1"]), linear(block["fc2"]), norm.weight, norm.bias,
                      pointer(block["modulation"])});
  }
  a.num_steps = static_cast<int>(steps.size());
  a.steps = steps.data();
  a.depth = static_cast<int>(blocks.size());
  a.blocks = blocks.data();
  a.head_modulation = pointer(given["head_modulation"]);
  a.noise = pointer(given["noise"]);
  a.x = const_cast<float*>(pointer(given["x"]));
  py::gil_scoped_release released;
  nova::cpp::denoise(nova::cpp::kernels().at(kernel), a, threads, parallel);
}

}  // namespace

PYBIND11_MODULE(_cpp, module) {
  module.doc() = "CPU part of nova_kernels; works on addresses of float32 tensors, without torch.";
  module.def("kernels", &kernels,
             "(instructions, outputs of a panel of weights) of what this CPU runs, best first.");
  module.def("denoise", &denoise, "All steps of the denoise loop, in place.");
}
