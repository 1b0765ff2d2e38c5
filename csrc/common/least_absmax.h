// What the quotients of a block and its absolute maximum are computed by.
#pragma once

namespace memkernels {

// Absolute maxima below this count as this when they divide: the reciprocal stays finite.
constexpr float kLeastAbsmax = 1e-38f;

}  // namespace memkernels
