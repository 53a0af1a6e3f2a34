#ifndef LIB_GREET_H_
#define LIB_GREET_H_

#include <string>

// Greet returns the greeting for a name.
std::string Greet(const std::string& name);

#endif  // LIB_GREET_H_
