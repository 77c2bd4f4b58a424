// Launches of the persistent denoise kernel.
#include "denoise.cuh"

#include <initializer_list>

#include "check.h"
#include "launches.h"

namespace nova {

// In denoise_float16.cu and denoise_bfloat16.cu.
extern template DenoiseKernel denoise_kernel_for<__half>(int passes, int units);
extern template DenoiseKernel denoise_kernel_for<__nv_bfloat16>(int passes, int units);

namespace {

constexpr const char* kOp = "denoise";

DenoiseKernel kernel_for(Dtype dtype, int passes, int units) {
  switch (dtype) {
    case Dtype::kFloat16: return denoise_kernel_for<__half>(passes, units);
    case Dtype::kBFloat16: return denoise_kernel_for<__nv_bfloat16>(passes, units);
    default: throw std::invalid_argument("denoise: float16 or bfloat16");
  }
}

// A launch's configuration, with room for its attributes.
struct Configuration {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  Configuration(int blocks, int cluster_size, int shared_bytes, cudaStream_t stream) {
    // All blocks run at the same time, or the launch fails: they wait for each other.
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(cluster_size), 1, 1};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kDenoiseThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    // Cards before sm_90 do not know the second one.
    config.numAttrs = cluster_size > 1 ? 2 : 1;
  }
};

int attribute_of(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(kOp, cudaGetDevice(&device));
  check(kOp, cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

void allow_shared_memory(DenoiseKernel kernel, int bytes) {
  check(kOp, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

}  // namespace

void launch_denoise(const DenoiseArguments& arguments, void* stream) {
  const DenoiseKernel kernel = kernel_for(arguments.dtype, arguments.passes, arguments.units);
  const auto on = static_cast<cudaStream_t>(stream);
  allow_shared_memory(kernel, arguments.shared_bytes);
  Configuration launch(arguments.clusters * arguments.cluster_size, arguments.cluster_size,
                       arguments.shared_bytes, on);
  check(kOp, cudaMemsetAsync(arguments.arrivals, 0, sizeof(unsigned), on));
  check(kOp, cudaLaunchKernelEx(&launch.config, kernel, arguments));
}

int count_denoise_clusters(Dtype dtype, int passes, int cluster_size) {
  if (attribute_of(cudaDevAttrCooperativeLaunch) == 0) return 0;
  const int multiprocessors = attribute_of(cudaDevAttrMultiProcessorCount);
  if (cluster_size == 1) return multiprocessors;
  if (attribute_of(cudaDevAttrComputeCapabilityMajor) < 9) return 0;
  const DenoiseKernel kernel = kernel_for(dtype, passes, kMaxUnits);
  // Code that the driver made of an earlier card's PTX knows no clusters, whatever this card knows.
  cudaFuncAttributes code;
  check(kOp, cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(kernel)));
  if (code.ptxVersion < 90) return 0;
  const int shared_bytes = attribute_of(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  allow_shared_memory(kernel, shared_bytes);
  Configuration launch(multiprocessors / cluster_size * cluster_size, cluster_size, shared_bytes,
                       nullptr);
  // Drivers may know the question for clusters alone, whose answer is the same: one block takes all
  // the shared memory of a multiprocessor. One that knows neither launches no clusters.
  cudaLaunchConfig_t clusters_alone = launch.config;
  clusters_alone.attrs = &launch.attributes[1];
  clusters_alone.numAttrs = 1;
  int clusters = 0;
  for (const cudaLaunchConfig_t& config : {launch.config, clusters_alone}) {
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess) return clusters;
    cudaGetLastError();  // forgets the error, which later checks would see
  }
  return 0;
}

}  // namespace nova
