// What this build was compiled with, and what the GPUs of the machine offer.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace nova {

struct DeviceInfo {
  std::string name;
  int compute_capability_major;
  int compute_capability_minor;
  int sm_count;
  // The most shared memory that one block can get, when its kernel asks for it.
  std::size_t shared_memory_per_block_optin;
  std::size_t memory_bytes;
};

// One entry per visible GPU, in CUDA's order; none where there is no driver or no GPU.
std::vector<DeviceInfo> query_devices();

// For example "13.0".
std::string cuda_version();

// For example "nvcc 13.0.48".
std::string cuda_compiler();

}  // namespace nova
