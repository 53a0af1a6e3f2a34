// Package chunking cuts blobs into chunks where their content says so: FastCDC in the form of 2020 that
// REAPI's FastCdc2020Params describes, so that clients and this farm find the same chunks. A blob that
// differs from another in one place has all chunks but those around it in common with the other.
//
// The package knows only bytes; what the chunks are good for is in package frontend.
package chunking
