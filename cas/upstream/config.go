package upstream

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// Endpoint is where an upstream cache is.
type Endpoint struct {
	// Address is HOST:PORT.
	Address string
	// Secure is TLS.
	Secure bool
	// Instance is the instance name that all of the farm's instances are below; it may be empty.
	Instance string
}

// The ports of an address without one: the farm's own and that of HTTPS.
const (
	plainPort  = "8980"
	securePort = "443"
)

// ParseEndpoint parses grpc(s)://HOST[:PORT][/instance]. The error does not show the text, which may
// have a password in it.
func ParseEndpoint(text string) (Endpoint, error) {
	const form = "is not grpc://HOST[:PORT][/instance] or grpcs://HOST[:PORT][/instance]"
	u, err := url.Parse(text)
	if err != nil || u.Opaque != "" || u.Hostname() == "" {
		return Endpoint{}, errors.New("the address " + form)
	}
	if u.User != nil {
		return Endpoint{}, errors.New("the address has a user or a password in it; give a token as a header")
	}
	if u.RawQuery != "" || u.Fragment != "" {
		return Endpoint{}, errors.New("the address has something behind the instance name")
	}
	e := Endpoint{Instance: strings.Trim(u.Path, "/")}
	port := u.Port()
	switch u.Scheme {
	case "grpc":
		if port == "" {
			port = plainPort
		}
	case "grpcs":
		e.Secure = true
		if port == "" {
			port = securePort
		}
	default:
		return Endpoint{}, errors.New("the address " + form)
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return Endpoint{}, fmt.Errorf("the port %s of the address is not from 1 to 65535", digest.Quote(port))
	}
	if _, err := digest.SpaceOf(e.Instance, repb.DigestFunction_SHA256, ""); err != nil {
		return Endpoint{}, err
	}
	e.Address = net.JoinHostPort(u.Hostname(), port)
	return e, nil
}

// ParseHeaders parses KEY=VALUE pairs, which each call carries. Errors show keys, never values.
func ParseHeaders(pairs []string) (metadata.MD, error) {
	header := metadata.MD{}
	var errs []error
	for i, pair := range pairs {
		key, value, found := strings.Cut(pair, "=")
		key = strings.ToLower(strings.TrimSpace(key))
		switch {
		case !found || key == "":
			errs = append(errs, fmt.Errorf("header %d is not KEY=VALUE", i+1))
		case strings.Trim(key, "abcdefghijklmnopqrstuvwxyz0123456789-_.") != "" || strings.HasPrefix(key, "grpc-"):
			errs = append(errs, fmt.Errorf("header %s cannot be sent: a key has letters, digits, '-', '_' and '.' and does not begin with grpc-", digest.Quote(key)))
		case !strings.HasSuffix(key, "-bin") && !printable(value):
			errs = append(errs, fmt.Errorf("the value of header %s has characters that cannot be sent", digest.Quote(key)))
		default:
			header.Append(key, value)
		}
	}
	return header, errors.Join(errs...)
}

func printable(value string) bool {
	for i := range len(value) {
		if value[i] < ' ' || value[i] > '~' {
			return false
		}
	}
	return true
}

// Config is what Open needs. Zero fields take their defaults.
type Config struct {
	Endpoint Endpoint
	// CA is a file of PEM certificates that the upstream's must be signed by; without it those of the
	// system are trusted.
	CA string
	// Header goes with each call. It is never logged.
	Header metadata.MD
	// Stall bounds the wait for each single message, 30 s by default. A transfer may take as long as it
	// likes while messages come.
	Stall time.Duration
	// Probe is the wait before the first probe of an upstream that is down, 1 s by default. It doubles
	// up to half a minute.
	Probe time.Duration
	// Relearn is after which time the capabilities are asked again, 5 min by default.
	Relearn time.Duration
	// Drain bounds what is still copied when the process ends, 5 s by default.
	Drain time.Duration
	// Queue bounds the blobs, and on its own the results, that wait to be copied: 20 000 by default.
	Queue int
	Log   *slog.Logger
	// Registerer gets the metrics; nil keeps them private.
	Registerer prometheus.Registerer
}

func (cfg Config) withDefaults() Config {
	for field, value := range map[*time.Duration]time.Duration{
		&cfg.Stall: 30 * time.Second, &cfg.Probe: time.Second, &cfg.Relearn: 5 * time.Minute, &cfg.Drain: 5 * time.Second,
	} {
		if *field == 0 {
			*field = value
		}
	}
	if cfg.Queue == 0 {
		cfg.Queue = 20_000
	}
	return cfg
}

// transport returns the credentials of the connections.
func (cfg Config) transport() (credentials.TransportCredentials, error) { //nolint:ireturn // the library has no type for it
	if !cfg.Endpoint.Secure {
		if cfg.CA != "" {
			return nil, errors.New("a certificate authority was given for an upstream without TLS; its address begins with grpcs://")
		}
		return insecure.NewCredentials(), nil
	}
	settings := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CA != "" {
		pem, err := os.ReadFile(cfg.CA)
		if err != nil {
			return nil, fmt.Errorf("certificate authority: %w", err)
		}
		settings.RootCAs = x509.NewCertPool()
		if !settings.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("certificate authority: %s has no PEM certificate", cfg.CA)
		}
	}
	return credentials.NewTLS(settings), nil
}
