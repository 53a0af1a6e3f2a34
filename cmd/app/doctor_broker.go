package app

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// patient is a broker that answers.
type patient struct {
	nc      *nats.Conn
	js      jetstream.JetStream
	d       *Doctor
	account *jetstream.AccountInfo
	infos   map[string]*jetstream.StreamInfo
}

func (b *patient) close() { b.nc.Close() }

const (
	// wantedPayload is what the farm's own broker allows a message, and leastPayload what a chunk of a
	// blob and the largest records need.
	wantedPayload = 4 << 20
	leastPayload  = 1 << 20
)

// broker checks the way to a NATS server: the name, the port, the handshake.
func (d *Doctor) broker(ctx context.Context, p *process, e *exam) *patient {
	urls, found := d.servers()
	reached := 0
	for _, address := range urls {
		for single := range strings.SplitSeq(address, ",") {
			if d.reach(ctx, e, single, found) {
				reached++
			}
		}
	}
	if reached == 0 {
		return nil
	}
	connections, err := d.connect(ctx, p, "doctor")
	switch {
	case err == nil:
	case errors.Is(err, nats.ErrAuthorization) || strings.Contains(strings.ToLower(err.Error()), "authorization"):
		e.fail("nats", "put the user and password, or the token, into the URL of --nats", "the server refuses this client: %v", err)
		return nil
	case errors.Is(err, nats.ErrSecureConnRequired):
		e.fail("nats", "name the server with tls:// in --nats", "the server wants TLS: %v", err)
		return nil
	default:
		e.fail("nats", "check that the port is the client port of a NATS server (4222), not that of a cluster, of monitoring or of another program", "no handshake: %v", err)
		return nil
	}
	b := &patient{nc: connections[0], d: d}
	b.version(e)
	return b
}

// reach tells whether something listens at the address of a server.
func (d *Doctor) reach(ctx context.Context, e *exam, address, found string) bool {
	ctx, cancel := context.WithTimeoutCause(ctx, doctorTimeout, errors.New("no answer in time"))
	defer cancel()
	if !strings.Contains(address, "://") {
		address = "nats://" + address
	}
	u, err := url.Parse(address)
	if err != nil || u.Hostname() == "" {
		e.fail("address", "write nats://HOST:PORT", "%q is not the address of a NATS server (%s)", redacted(u, address), found)
		return false
	}
	port := u.Port()
	if port == "" {
		port = "4222"
	}
	host := net.JoinHostPort(u.Hostname(), port)
	if _, err := net.DefaultResolver.LookupHost(ctx, u.Hostname()); err != nil {
		e.fail("address", "correct the name, or the machine's DNS", "the name of %s is not known: %v (%s)", host, err, found)
		return false
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", host)
	switch {
	case err == nil:
		conn.Close() //nolint:errcheck // nothing was said
		e.ok("address", "%s listens (%s)", host, found)
		return true
	case errors.Is(err, syscall.ECONNREFUSED):
		e.fail("address", "start 'jetfarm up' or 'jetfarm broker', or name another server with --nats", "nothing listens at %s (%s)", host, found)
	case ctx.Err() != nil || errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH):
		e.fail("address", "look for a firewall or a wrong address between this machine and the server", "%s does not answer: %v (%s)", host, err, found)
	default:
		e.fail("address", "correct --nats", "%s can't be reached: %v (%s)", host, err, found)
	}
	return false
}

// redacted is an address without its password.
func redacted(u *url.URL, text string) string {
	if u != nil {
		return u.Redacted()
	}
	if i := strings.LastIndex(text, "@"); i >= 0 {
		return "..." + text[i:]
	}
	return text
}

func (b *patient) version(e *exam) {
	const fix = "run 'jetfarm broker', or update the NATS server"
	var rtt string
	if took, err := b.nc.RTT(); err == nil {
		rtt = ", " + took.Round(10*time.Microsecond).String() + " away"
	}
	have, want := b.nc.ConnectedServerVersion(), server.VERSION
	if older(have, want) {
		e.fail("nats", fix, "the server %s has version %s, this farm needs %s", b.nc.ConnectedServerName(), have, minor(want))
	} else {
		e.ok("nats", "connected to server %s, version %s%s", b.nc.ConnectedServerName(), have, rtt)
	}
	switch most := b.nc.MaxPayload(); {
	case most < leastPayload:
		e.fail("max_payload", "set max_payload: 4MB in the server's configuration", "messages may have %s, at least %s are needed", bytesText(uint64(most)), bytesText(leastPayload)) //nolint:gosec // not negative
	case most < wantedPayload:
		e.warn("max_payload", "set max_payload: 4MB in the server's configuration", "messages may have %s, large results and batches want %s", bytesText(uint64(most)), bytesText(wantedPayload))
	default:
		e.ok("max_payload", "messages may have %s", bytesText(uint64(most)))
	}
}

// older compares the first two numbers of versions.
func older(have, want string) bool {
	var h, w [2]int
	if n, err := fmt.Sscanf(have, "%d.%d", &h[0], &h[1]); n < 2 || err != nil {
		return true
	}
	if n, err := fmt.Sscanf(want, "%d.%d", &w[0], &w[1]); n < 2 || err != nil {
		return false
	}
	return slices.Compare(h[:], w[:]) < 0
}

func minor(version string) string {
	parts := strings.SplitN(version, ".", 3)
	return strings.Join(parts[:min(2, len(parts))], ".") + " or newer"
}

// jetstream checks that there is one and that it has room.
func (b *patient) jetstream(ctx context.Context, e *exam) bool {
	ctx, cancel := context.WithTimeoutCause(ctx, doctorTimeout, errors.New("no answer in time"))
	defer cancel()
	var err error
	if b.js, err = jetstream.New(b.nc, jetstream.WithDefaultTimeout(doctorTimeout)); err == nil {
		b.account, err = b.js.AccountInfo(ctx)
	}
	switch {
	case err == nil:
	case errors.Is(err, jetstream.ErrJetStreamNotEnabled) || errors.Is(err, nats.ErrNoResponders):
		e.fail("jetstream", "run 'jetfarm broker', or write 'jetstream {}' into the server's configuration", "it is off")
		return false
	case errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount):
		e.fail("jetstream", "turn JetStream on for the account in the server's configuration", "it is off for this account")
		return false
	default:
		e.fail("jetstream", "read the server's log; in a cluster, most of its servers must run", "it does not answer: %v", err)
		return false
	}
	const fix = "raise max_file of the account, or --max-store of 'jetfarm up' and 'jetfarm broker'"
	used, limit := b.account.Store, b.account.Limits.MaxStore
	switch {
	case limit > 0 && used >= uint64(limit):
		e.fail("jetstream", fix, "its storage is full: %s of %s", bytesText(used), bytesText(uint64(limit)))
	case limit > 0 && used >= uint64(limit)/10*9:
		e.warn("jetstream", fix, "its storage is nearly full: %s of %s", bytesText(used), bytesText(uint64(limit)))
	default:
		e.ok("jetstream", "%d streams with %s", b.account.Streams, bytesText(used))
	}
	return true
}

// farmStreams are those that a farm can't do without besides the blobs (docs/PROTOCOL.md).
func farmStreams() []string {
	return []string{"OPERATIONS", "JOBS", "FLIGHTS", "KV_pools", "KV_workers", actionStream}
}

// streams checks that all are there, on disk, alike, and that each has a leader.
func (b *patient) streams(ctx context.Context, e *exam) bool {
	b.infos = make(map[string]*jetstream.StreamInfo)
	asked := time.Now()
	list := b.js.ListStreams(ctx)
	blobs := 0
	var clock time.Time
	for info := range list.Info() {
		b.infos[info.Config.Name] = info
		if strings.HasPrefix(info.Config.Name, blobStreams) {
			blobs++
		}
		if clock.IsZero() {
			clock = info.TimeStamp
		}
	}
	if err := list.Err(); err != nil {
		e.fail("streams", "read the server's log", "they can't be listed: %v", err)
		return false
	}
	took := time.Since(asked)
	var missing []string
	for _, name := range farmStreams() {
		if b.infos[name] == nil {
			missing = append(missing, name)
		}
	}
	switch {
	case blobs == 0 && len(missing) == len(farmStreams()):
		e.fail("streams", "start 'jetfarm up' or a frontend, or name the farm's server with --nats", "no farm has used this server yet")
		return false
	case blobs == 0:
		missing = append(missing, blobStreams+"...")
	}
	if len(missing) > 0 {
		e.fail("streams", "start a frontend or worker again, which makes them", "missing: %s", strings.Join(missing, ", "))
	} else {
		e.ok("streams", "all are there, %d of them for blobs", blobs)
	}
	b.clock(e, clock, asked, took)
	b.config(e)
	b.health(e)
	return blobs > 0
}

// clock compares this machine's with the server's.
func (b *patient) clock(e *exam, theirs, asked time.Time, took time.Duration) {
	if theirs.IsZero() {
		return
	}
	const most = 5 * time.Second
	apart := theirs.Sub(asked)
	if apart < 0 {
		apart = -apart
	}
	if apart > most+took {
		e.warn("clock", "let an NTP client set the clocks of both machines", "this machine's and the server's are %v apart", apart.Round(time.Second))
		return
	}
	e.ok("clock", "this machine's and the server's agree")
}

// config checks what somebody may have changed.
func (b *patient) config(e *exam) {
	const fix = "start a frontend or worker again, which mends it; do not change the farm's streams by hand"
	before := len(e.findings)
	replicas := make(map[int][]string)
	for name, info := range b.infos {
		ours := strings.HasPrefix(name, blobStreams) || slices.Contains(farmStreams(), name)
		if !ours {
			continue
		}
		replicas[info.Config.Replicas] = append(replicas[info.Config.Replicas], name)
		if info.Config.Storage != jetstream.FileStorage {
			e.fail("configuration", "stop the farm, delete the stream and start again", "stream %s is in memory: a restart of the server loses it", name)
		}
	}
	if info := b.infos[actionStream]; info != nil && info.Config.RePublish == nil {
		e.warn("configuration", fix, "stream %s does not tell its changes: frontends may serve results that were replaced up to a minute ago", actionStream)
	}
	if len(replicas) > 1 {
		e.warn("configuration", "start a frontend with --replicas", "not all streams have the same replicas: %v", replicas)
	}
	if len(e.findings) == before {
		for n := range replicas {
			e.ok("configuration", "%d replicas of each stream, on disk", n)
		}
	}
}

// health checks that the streams of a cluster can be written and are where they should be.
func (b *patient) health(e *exam) {
	const fix = "start the servers that are missing, and read their logs"
	clustered, single := false, false
	before := len(e.findings)
	for name, info := range b.infos {
		if info.Cluster == nil || info.Cluster.Name == "" {
			continue
		}
		clustered = true
		single = single || info.Config.Replicas == 1
		if info.Cluster.Leader == "" {
			e.fail("cluster", fix, "stream %s has no leader: it can't be read or written", name)
		}
		for _, peer := range info.Cluster.Replicas {
			if peer.Offline || !peer.Current {
				e.warn("cluster", fix, "stream %s: the copy on %s is behind or offline", name, peer.Name)
			}
		}
	}
	if single {
		e.warn("cluster", "start the frontends with --replicas 3", "the server belongs to a cluster, but streams have one copy: the loss of one server stops the farm")
	}
	if clustered && len(e.findings) == before {
		e.ok("cluster", "every stream has a leader and current copies")
	}
}
