// The forward algorithms a caller can name: one folder of kernels each, and the choice between
// them.
#pragma once

namespace flash_ext {

enum class Algorithm { kAuto, kV1, kV2, kV3 };

}  // namespace flash_ext
