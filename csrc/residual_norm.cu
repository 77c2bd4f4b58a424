// Launches of residual_norm.
#include "residual_norm.cuh"

#include "launches.h"
#include "row_launch.cuh"

namespace nova {

void launch_residual_norm(const ResidualNormArguments& a, void* stream) {
  launch_rows("residual_norm", a, stream);
}

void launch_residual_norm_backward(const ResidualNormBackwardArguments& a, void* stream) {
  launch_rows("residual_norm_backward", a, stream);
}

}  // namespace nova
