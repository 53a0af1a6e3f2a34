#include "lib/greet.h"

std::string Greet(const std::string& name) { return "Hello, " + name + "!"; }
