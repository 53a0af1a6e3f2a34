// Package asset remembers which blob or directory the name of an asset stands for: a URI and the
// qualifiers that select its content. It is what the Remote Asset API keeps between calls.
//
// The names are in a JetStream key-value bucket of bounded size whose oldest entries give way. An entry
// says nothing of whether its blobs are still there: whoever uses it asks the CAS.
package asset
