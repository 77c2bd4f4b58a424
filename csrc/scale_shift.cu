// Launches of scale_shift.
#include "scale_shift.cuh"

#include "launches.h"
#include "row_launch.cuh"

namespace nova {

void launch_scale_shift(const ScaleShiftArguments& a, void* stream) {
  launch_rows("scale_shift", a, stream);
}

void launch_scale_shift_backward(const ScaleShiftBackwardArguments& a, void* stream) {
  launch_rows("scale_shift_backward", a, stream);
}

}  // namespace nova
