// Package compress is zstd as REAPI's `zstd` compressor means it: the frames of RFC 8878, any number of
// them one after the other.
//
// What is decoded comes from clients and other caches, so it is hostile until it was decoded: the window
// of a frame is at most MaxWindow, the output at most what the caller said, the input at most about twice
// that, dictionaries are refused, checksums are checked, and the input has to end where its last frame
// ends. A decoder takes at most MaxWindow and half a MiB of memory, whatever it is fed, and no goroutine.
//
// What is encoded here has one level, the fastest: the next one makes frames of object files some 5 %
// smaller and takes half as long again. Coders are kept in pools that the garbage collector empties.
package compress
