// Lets a test set the emulator's options.

#include "emulator.h"

extern "C" void emu_configure(int schedule, uint64_t seed, int fault, uint32_t poison) {
  emu::settings = {schedule, seed, fault, poison};
}
