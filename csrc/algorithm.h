// The forward algorithms a caller can name; one folder of kernels each.
#pragma once

namespace flash_ext {

enum class Algorithm { kV1, kV2 };

}  // namespace flash_ext
