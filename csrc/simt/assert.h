// Shadows the C header, so that a device assert ends the launch with a message instead of the whole process.
// No include guard, as in the C header: <cassert> may follow an earlier redefinition.
#include "error.h"

#undef assert
#define assert(condition) \
  ((condition) ? static_cast<void>(0) : ::memkernels::simt::fail_assertion(#condition, __FILE__, __LINE__))
