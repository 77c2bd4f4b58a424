// How Python fills the arguments of launches: by name, with tensors as their addresses.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"

namespace nova {

// Types belong to their module: the emulator of the tests is another one with the same types.
const pybind11::module_local kLocal;

template <typename Class, typename Pointer>
void bind_pointer(pybind11::class_<Class>& type, const char* name, Pointer Class::* field) {
  type.def_property(
      name, [field](const Class& self) { return reinterpret_cast<std::uintptr_t>(self.*field); },
      [field](Class& self, std::uintptr_t address) {
        self.*field = reinterpret_cast<Pointer>(address);
      });
}

// Of arrays of a denoise launch: throws std::invalid_argument if they are longer than `limit`.
inline void check_count(const char* what, std::size_t count, std::size_t limit) {
  if (count <= limit) return;
  throw std::invalid_argument("denoise: " + std::string(what) + ": a launch takes up to " +
                              std::to_string(limit) + ", got " + std::to_string(count));
}

template <std::size_t N>
void bind_pointers(pybind11::class_<DenoiseArguments>& type, const char* name,
                   const void* (DenoiseArguments::*field)[N]) {
  type.def_property(
      name,
      [field](const DenoiseArguments& self) {
        std::vector<std::uintptr_t> addresses;
        for (const void* pointer : self.*field) {
          addresses.push_back(reinterpret_cast<std::uintptr_t>(pointer));
        }
        return addresses;
      },
      [field, name](DenoiseArguments& self, const std::vector<std::uintptr_t>& addresses) {
        check_count(name, addresses.size(), N);
        for (std::size_t i = 0; i < addresses.size(); ++i) {
          (self.*field)[i] = reinterpret_cast<const void*>(addresses[i]);
        }
      });
}

// name, name_outer and name_inner: address and strides of a tensor of rows.
template <typename Class>
void bind_rows(pybind11::class_<Class>& type, const std::string& name, StridedRows Class::* field) {
  type.def_property(
      name.c_str(),
      [field](const Class& self) { return reinterpret_cast<std::uintptr_t>((self.*field).data); },
      [field](Class& self, std::uintptr_t address) {
        (self.*field).data = reinterpret_cast<void*>(address);
      });
  const auto bind_stride = [&](const std::string& stride_name, int64_t StridedRows::* stride) {
    type.def_property(
        stride_name.c_str(),
        [field, stride](const Class& self) { return self.*field.*stride; },
        [field, stride](Class& self, int64_t elements) { self.*field.*stride = elements; });
  };
  bind_stride(name + "_outer", &StridedRows::outer);
  bind_stride(name + "_inner", &StridedRows::inner);
}

template <typename Class>
pybind11::class_<Class> bind_row_arguments(pybind11::module_& module, const char* name) {
  pybind11::class_<Class> type(module, name, kLocal);
  type.def(pybind11::init<>())
      .def_readwrite("dtype", &Class::dtype)
      .def_readwrite("num_rows", &Class::num_rows)
      .def_readwrite("inner", &Class::inner)
      .def_readwrite("width", &Class::width)
      .def_readwrite("eps", &Class::eps);
  return type;
}

inline void bind_scale_shift(pybind11::module_& module) {
  using Forward = ScaleShiftArguments;
  auto forward = bind_row_arguments<Forward>(module, "ScaleShiftArguments");
  forward.def_readwrite("scale_offset", &Forward::scale_offset);
  bind_rows(forward, "x", &Forward::x);
  bind_rows(forward, "scale", &Forward::scale);
  bind_rows(forward, "shift", &Forward::shift);
  bind_rows(forward, "out", &Forward::out);

  using Backward = ScaleShiftBackwardArguments;
  auto backward = bind_row_arguments<Backward>(module, "ScaleShiftBackwardArguments");
  backward.def_readwrite("scale_offset", &Backward::scale_offset);
  bind_rows(backward, "grad", &Backward::grad);
  bind_rows(backward, "x", &Backward::x);
  bind_rows(backward, "scale", &Backward::scale);
  bind_rows(backward, "grad_x", &Backward::grad_x);
  bind_rows(backward, "grad_scale", &Backward::grad_scale);
}

inline void bind_residual_norm(pybind11::module_& module) {
  using Forward = ResidualNormArguments;
  auto forward = bind_row_arguments<Forward>(module, "ResidualNormArguments");
  bind_rows(forward, "x", &Forward::x);
  bind_rows(forward, "h", &Forward::h);
  bind_rows(forward, "gate", &Forward::gate);
  bind_rows(forward, "out", &Forward::out);
  bind_pointer(forward, "weight", &Forward::weight);
  bind_pointer(forward, "bias", &Forward::bias);

  using Backward = ResidualNormBackwardArguments;
  auto backward = bind_row_arguments<Backward>(module, "ResidualNormBackwardArguments");
  backward.def_readwrite("strip", &Backward::strip);
  bind_rows(backward, "grad", &Backward::grad);
  bind_rows(backward, "h", &Backward::h);
  bind_rows(backward, "gate", &Backward::gate);
  bind_rows(backward, "grad_h", &Backward::grad_h);
  bind_rows(backward, "grad_gate", &Backward::grad_gate);
  bind_pointer(backward, "weight", &Backward::weight);
  bind_pointer(backward, "bias", &Backward::bias);
  bind_pointer(backward, "weight_sums", &Backward::weight_sums);
  bind_pointer(backward, "bias_sums", &Backward::bias_sums);
}

inline void bind_arguments(pybind11::module_& module) {
  module.attr("MAX_DENOISE_STEPS") = kMaxDenoiseSteps;
  pybind11::enum_<Dtype>(module, "Dtype", kLocal)
      .value("float16", Dtype::kFloat16)
      .value("bfloat16", Dtype::kBFloat16)
      .value("float32", Dtype::kFloat32);

  bind_scale_shift(module);
  bind_residual_norm(module);

  using D = DenoiseArguments;
  using Numbers = std::array<float, 6>;
  pybind11::class_<D> denoise(module, "DenoiseArguments", kLocal);
  denoise.def(pybind11::init<>())
      .def_readwrite("dtype", &D::dtype)
      .def_readwrite("tokens", &D::tokens)
      .def_readwrite("tokens_per_sample", &D::tokens_per_sample)
      .def_readwrite("passes", &D::passes)
      .def_readwrite("width", &D::width)
      .def_readwrite("token_dim", &D::token_dim)
      .def_readwrite("depth", &D::depth)
      .def_readwrite("clusters", &D::clusters)
      .def_readwrite("cluster_size", &D::cluster_size)
      .def_readwrite("units", &D::units)
      .def_readwrite("weight_slots", &D::weight_slots)
      .def_readwrite("shared_bytes", &D::shared_bytes)
      .def("set_numbers", [](D& self, const std::vector<Numbers>& steps) {
        check_count("steps", steps.size(), kMaxDenoiseSteps);
        for (std::size_t i = 0; i < steps.size(); ++i) {
          const Numbers& n = steps[i];
          self.numbers[i] = {n[0], n[1], n[2], n[3], n[4], n[5]};
        }
        self.steps = static_cast<int>(steps.size());
      });
  bind_pointer(denoise, "x", &D::x);
  bind_pointer(denoise, "out", &D::out);
  bind_pointer(denoise, "noise", &D::noise);
  bind_pointer(denoise, "outside", &D::outside);
  bind_pointer(denoise, "embed_weight", &D::embed_weight);
  bind_pointer(denoise, "embed_bias", &D::embed_bias);
  bind_pointers(denoise, "layer_weight", &D::layer_weight);
  bind_pointers(denoise, "layer_bias", &D::layer_bias);
  bind_pointers(denoise, "norm_weight", &D::norm_weight);
  bind_pointers(denoise, "norm_bias", &D::norm_bias);
  bind_pointer(denoise, "head_weight", &D::head_weight);
  bind_pointer(denoise, "head_bias", &D::head_bias);
  bind_pointers(denoise, "modulation", &D::modulation);
  bind_pointer(denoise, "normed", &D::normed);
  bind_pointer(denoise, "hidden", &D::hidden);
  bind_pointer(denoise, "branch", &D::branch);
  bind_pointer(denoise, "squares", &D::squares);
  bind_pointer(denoise, "arrivals", &D::arrivals);
}

}  // namespace nova
