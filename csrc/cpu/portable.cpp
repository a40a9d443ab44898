// Lets a library that is linked here run with an older glibc (2.27) and libstdc++ (of GCC 8), as
// manylinux_2_28 wheels must. A linker takes the newest version of each symbol that it finds; these hidden
// definitions come first.
#include <features.h>

#include <new>

#if defined(__x86_64__) && defined(__GLIBC__)
extern "C" {

// Since 2.29 exp and log do not set errno by way of a wrapper. Their values are the same.
__asm__(".symver nckernels_old_exp, exp@GLIBC_2.2.5\n.hidden exp");
__asm__(".symver nckernels_old_log, log@GLIBC_2.2.5\n.hidden log");
double nckernels_old_exp(double);
double nckernels_old_log(double);
double exp(double x) { return nckernels_old_exp(x); }
double log(double x) { return nckernels_old_log(x); }

// std::__throw_bad_array_new_length(), which std::vector of GCC 11 and newer calls for an impossible size.
__attribute__((visibility("hidden"), noreturn)) void _ZSt28__throw_bad_array_new_lengthv() {
  throw std::bad_alloc();
}

}  // extern "C"
#endif
